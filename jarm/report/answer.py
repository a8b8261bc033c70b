"""The answer of a comparison in one line: should one label by a rule here, and by which?"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jarm.report.curves import METRIC, WORDS
from jarm.report.statistics import interval, number

MIN_SEEDS = 5
"""Minimum number of paired seeds to answer from: with fewer, intervals are too narrow."""

Row = Mapping[str, Any]


def answer(rules: Mapping[str, Row], baseline: str = "random", metric: str = METRIC) -> str:
    """A plain answer from the numbers of all rules.

    It rests on the intervals of all rules together (`area_gain_together`), which hold at once: the best of several
    rules would otherwise look better than it is.

    Args:
      rules: rule -> its numbers, as `jarm.report.summary.summarise` has them.
      baseline: the rule that others are compared with.
      metric: of their learning curves.
    """
    others = {rule: row for rule, row in rules.items() if rule != baseline}
    if not others:
        return f"Nothing to answer: {baseline} alone was run; give --rules to compare it with."
    seeds = max(row["paired_seeds"] for row in others.values())
    if not seeds:
        return f"Nothing to answer yet: no rule has a whole run beside one of {baseline} on the same seed."
    if seeds < MIN_SEEDS:
        return (
            f"Too few seeds to say: {seeds} of the {MIN_SEEDS} or more that an answer needs; raise --seeds, and the "
            "same command makes those that are missing."
        )
    known = {rule: row for rule, row in others.items() if row["paired_seeds"] >= MIN_SEEDS and _gain(row)}
    if not known:
        return f"Nothing to answer: no learning curve has a height that compares with {baseline}'s."
    ranked = sorted(known, key=lambda rule: _gain(known[rule])["mean"], reverse=True)
    better = [rule for rule in ranked if _gain(known[rule])["low"] > 0]
    worse = [rule for rule in ranked if _gain(known[rule])["high"] < 0]
    best = (better or ranked)[0]
    detail = _detail(best, known[best], baseline, len(known), WORDS[metric])
    if better:
        also = f" {_listed(better[1:])} beat{'s' * (len(better) == 2)} {baseline} too." if better[1:] else ""
        return f"Yes, choose pairs by {best} on data like these. {detail}{_reached(known[best], baseline)}.{also}"
    advice = f"label pairs chosen by {baseline} here"
    if len(worse) == len(known):
        which = "The rule was" if len(known) == 1 else f"All {len(known)} rules were"
        return f"No, {advice}. {which} worse than {baseline}; the nearest: {detail}."
    also = f" {_listed(worse)} {'was' if len(worse) == 1 else 'were'} worse than {baseline}." if worse else ""
    more = "judge by more pairs" if "test_prompts" in known[best] else "run more seeds"
    return f"No gain shown: {advice}, or {more}. The best mean: {detail}, which may be chance.{also}"


def answer_of_sweep(settings: Sequence[Mapping[str, Row]], baseline: str = "random") -> str:
    """A plain answer from all settings of a sweep: which rules are shown to beat the baseline, and in how many of them.

    It rests on the intervals of all rules in all settings together.

    Args:
      settings: of each setting its rules, as for `answer`.
      baseline: the rule that others are compared with.
    """
    rows = [(rule, row) for rules in settings for rule, row in rules.items() if rule != baseline]
    if not rows:
        return f"Nothing to answer: {baseline} alone was run; give `rules` to compare it with."
    seeds = max(row["paired_seeds"] for _, row in rows)
    if not seeds:
        return f"Nothing to answer: no rule has a whole run beside one of {baseline} on the same seed."
    if seeds < MIN_SEEDS:
        return f"Too few seeds to say: {seeds} of the {MIN_SEEDS} or more that an answer needs; raise `seeds`."
    gains = [(rule, _gain(row)) for rule, row in rows if row["paired_seeds"] >= MIN_SEEDS and _gain(row)]
    if not gains:
        return f"Nothing to answer: no learning curve has a height that compares with {baseline}'s."
    better = collections.Counter(rule for rule, gain in gains if gain["low"] > 0)
    worse = collections.Counter(rule for rule, gain in gains if gain["high"] < 0)
    known = sum(any(row["paired_seeds"] >= MIN_SEEDS and _gain(row) for row in rules.values()) for rules in settings)
    count = f"{known:,} setting{'s' * (known != 1)}"
    if known < len(settings):
        count += f" with {MIN_SEEDS} seeds or more (of {len(settings):,})"
    said = f"No rule is shown to beat {baseline} in any of {count}: label pairs chosen by {baseline} there."
    if better:
        said = f"Better than {baseline}, of {count}: {_counted(better)}."
    if worse:
        said += f" Worse than {baseline}: {_counted(worse)}."
    return f"{said} Intervals of 95 % in mean Spearman, which allow for comparing {len(rows):,} curves."


def _counted(rules: collections.Counter[str]) -> str:
    return _listed([f"{rule} in {count:,}" for rule, count in rules.most_common()])


def _gain(row: Row) -> Any:
    """The interval of a row's gain in area, of all rules together; None where it has no finite end."""
    gain = row.get("area_gain_together")
    ends = [None] if gain is None else [gain[name] for name in ("mean", "low", "high")]
    return gain if all(end is not None and math.isfinite(end) for end in ends) else None


def _detail(rule: str, row: Row, baseline: str, rules: int, word: str) -> str:
    gain, labels = _gain(row), row["labels"]
    side, sign = ("above", 1) if gain["mean"] >= 0 else ("below", -1)
    ends = interval(*sorted((sign * gain["low"], sign * gain["high"])))
    seeds = f"{row['paired_seeds']} seeds"
    if "test_prompts" in row:
        seeds += f" and {row['test_prompts']:,} held-out prompts"
    corrected = f", which allows for comparing {rules} rules" if rules > 1 else ""
    return (
        f"{rule} is {number(sign * gain['mean'])} {ends} {side} {baseline} in mean {word} over "
        f"{labels[0]:.0f} to {labels[-1]:.0f} labels, a 95 % interval over {seeds}{corrected}"
    )


def _reached(row: Row, baseline: str) -> str:
    """When the rule is where the baseline ends."""
    saving = row.get("saving")
    if saving is None or saving["labels"] is None or not math.isfinite(saving["labels"]):
        return ""
    return f", and is where {baseline} ends after {row['labels_needed']} of {saving['limit']:.0f} labels"


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
