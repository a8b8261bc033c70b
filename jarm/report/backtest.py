"""The answer of a backtest: intervals over seeds and held-out prompts at once.

Recorded pairs to be judged by are few, and all seeds share them: an interval over seeds alone would take what is
peculiar to these few prompts for what a rule gains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jarm.core.types import Float, Int
from jarm.report.answer import MIN_SEEDS, answer
from jarm.report.curves import ACCURACY, curves, runs_of
from jarm.report.held_out import unpack
from jarm.report.statistics import (
    Interval,
    LabelSaving,
    area_under_curve,
    interval,
    number,
    saving_of_means,
    t_quantile,
    verdict,
)
from jarm.report.summary import labels_needed

LONGER = "longer response"
"""Name of the reference line of a model that prefers the longer response."""
DRAWS, CHUNK = 4000, 500
"""Resamples of seeds and prompts, and how many are made at a time."""


def two_way_ci(
    values: Float[np.ndarray, "S P"], counts: Int[np.ndarray, "P"], comparisons: int = 1, *, level: float = 0.95
) -> Interval:
    """Mean over seeds and pairs, and its interval over seeds and prompts.

    The squared standard error is that over seeds plus that over prompts as clusters of pairs. What both have in common
    is counted twice, so the interval is rather too wide than too narrow; Student's t has the degrees of the smaller
    number, at level 1 - (1 - level) / comparisons (Bonferroni).

    Args:
      values: `[S, P]`, mean over the pairs of a prompt in a seed, or difference of two such means.
      counts: `[P]` number of pairs of each prompt.
      comparisons: number of intervals that are read together.
      level: probability that all of them cover.

    Returns:
      The interval; its ends are NaN for fewer than two seeds or prompts.

    Example:
      Five numbers by which seeds differ, and the same five by which prompts do.

      >>> each = 0.1 * np.arange(5)
      >>> by_seeds = two_way_ci(each[:, None] + np.zeros(8), np.ones(8, int))
      >>> by_prompts = two_way_ci(each + np.zeros((8, 1)), np.ones(5, int))
      >>> [f"{found.mean:.2f} ({found.low:.3f} to {found.high:.3f})" for found in (by_seeds, by_prompts)]
      ['0.20 (0.004 to 0.396)', '0.20 (0.004 to 0.396)']
    """
    S, P = values.shape
    of_seeds, of_prompts = values @ counts / counts.sum(), values.mean(axis=0)
    mean = float(of_seeds.mean())
    if min(S, P) < 2:
        return Interval(mean, math.nan, math.nan, S)
    residual = counts * (of_prompts - mean)
    variance = of_seeds.var(ddof=1) / S + np.square(residual).sum() * P / (P - 1) / counts.sum() ** 2
    reach = t_quantile(1 - (1 - level) / (2 * comparisons), min(S, P) - 1) * math.sqrt(variance)
    return Interval(mean, mean - reach, mean + reach, S)


def two_way_saving(
    labels: Float[np.ndarray, "T"],
    right: Float[np.ndarray, "S T P"],
    baseline: Float[np.ndarray, "S T P"],
    counts: Int[np.ndarray, "P"],
    comparisons: int = 1,
) -> LabelSaving:
    """Labels to the baseline's final accuracy, with an interval over resampled seeds and prompts.

    Args:
      labels: `[T]` label counts.
      right, baseline: `[S, T, P]` accuracy of the rule and of the baseline, seed by seed, prompt by prompt.
      counts: `[P]` number of pairs of each prompt.
      comparisons: number of intervals that are read together (Bonferroni).
    """
    S, _, P = right.shape
    rng, drawn = np.random.default_rng(0), (list[np.ndarray](), list[np.ndarray]())
    for _ in range(0, DRAWS, CHUNK):
        seeds = rng.multinomial(S, np.full(S, 1 / S), CHUNK) / S
        pairs = rng.multinomial(P, np.full(P, 1 / P), CHUNK) * counts
        for made, each in zip(drawn, (right, baseline), strict=True):
            of_seeds = np.tensordot(pairs, each, (1, 2))  # [D, S, T]: prompts first, as there are many
            made.append(np.einsum("ds,dst->dt", seeds, of_seeds) / np.maximum(pairs.sum(axis=1), 1)[:, None])
    means = tuple(each.mean(axis=0) @ counts / counts.sum() for each in (right, baseline))
    resampled = tuple(np.concatenate(made) for made in drawn)
    return saving_of_means(
        labels, labels, (means[0], means[1]), (resampled[0], resampled[1]), S, level=1 - 0.05 / comparisons
    )


def with_prompts(
    summary: Mapping[str, Any], records: list[dict[str, Any]], counts: Int[np.ndarray, "P"], packed: str
) -> dict[str, Any]:
    """A summary whose intervals are over seeds and held-out prompts, and whose answer and verdicts rest on these.

    Args:
      summary: the result of `jarm.report.summary.summarise` for accuracy.
      records: that it was made of.
      counts: `[P]` number of decided pairs of each held-out prompt.
      packed: field of the records with the accuracy on each of these prompts, as `held_out.pack` writes it.

    Returns:
      The same with other rows of `rules`, and the `answer`.
    """
    runs, baseline = runs_of(records), summary["baseline"]
    rules, others = dict(summary["rules"]), max(len(summary["rules"]) - 1, 1)

    def right(rule: str, seeds: list[int]) -> np.ndarray:
        return np.array([[unpack(line[packed]) for line in runs[rule][seed]] for seed in seeds])

    for rule, row in summary["rules"].items():
        paired = [seed for seed in runs.get(rule, {}) if seed in runs.get(baseline, {})]
        if not paired:
            continue
        labels = curves(runs[rule], "labels", paired).mean(axis=0)
        own, base = right(rule, paired), right(baseline, paired)
        rules[rule] = row | _row(labels, own, base, counts, others, baseline if rule != baseline else None)
    said = [answer(rules, baseline, ACCURACY), _learnt(rules.get(baseline, {}), baseline, summary["reference"])]
    return {**summary, "rules": rules, "answer": " ".join(each for each in said if each)}


def _learnt(row: Mapping[str, Any], baseline: str, reference: Mapping[str, Any]) -> str:
    """What the baseline teaches at all, beside what takes no labels; nothing where it has no whole run."""
    if "test_prompts" not in row:
        return ""
    mean, low, high, _ = row["final"].values()
    longer = reference.get(LONGER, {}).get(ACCURACY)
    beside = "" if longer is None else f"; the longer response is right in {number(longer)}"
    ends = f" {interval(max(low, 0.0), min(high, 1.0))}" if math.isfinite(low) else ""
    chance = ", which may be chance" if low <= 0.5 else ""
    labels = f"After {row['labels'][-1]:.0f} labels"
    said = f"{labels} {baseline} is right in {number(mean)}{ends} of held-out pairs{chance}{beside}."
    return f"{said} Where nothing is shown to be learnt, nothing can be shown to save labels." if chance else said


def _row(
    labels: np.ndarray, own: np.ndarray, base: np.ndarray, counts: np.ndarray, others: int, baseline: str | None
) -> dict[str, Any]:
    """The numbers of one rule; of the baseline itself where `baseline` is None."""
    row: dict[str, Any] = {"test_prompts": len(counts), "seeds_to_see": None}
    heights = {name: (_heights(labels, own, name), _heights(labels, base, name)) for name in ("area", "final")}
    for name, (mine, theirs) in heights.items():
        row[name] = _ends(two_way_ci(mine, counts))._asdict()
        row[f"{name}_gain"] = _ends(two_way_ci(mine - theirs, counts))._asdict()
    if baseline is None:
        return row
    area, reference = heights["area"]
    together = _ends(two_way_ci(area - reference, counts, others))
    saving = two_way_saving(labels, own, base, counts, others)
    saving = saving._replace(ratio=_ends(saving.ratio))
    said = verdict(together, saving, baseline=baseline, metric="mean accuracy")
    if len(own) < MIN_SEEDS:
        sign = "+" if together.mean >= 0 else ""
        said = (
            f"nothing shown: {sign}{number(together.mean)} in mean accuracy against {baseline}; {len(own)} are too few "
            f"seeds for an interval, run at least {MIN_SEEDS}"
        )
    return row | {
        "area_gain_together": together._asdict(),
        "saving": saving._asdict() | {"ratio": saving.ratio._asdict()},
        "labels_needed": labels_needed(saving, baseline=False),
        "verdict": said,
    }


def _ends(found: Interval) -> Interval:
    """The interval, without ends where seeds are too few for any."""
    return found._replace(low=math.nan, high=math.nan) if found.seeds < MIN_SEEDS else found


def _heights(labels: np.ndarray, right: np.ndarray, name: str) -> np.ndarray:
    """`[S, P]` of `[S, T, P]`: the last accuracy, or the mean height of the curve."""
    return right[:, -1] if name == "final" else area_under_curve(labels, np.swapaxes(right, 1, 2))
