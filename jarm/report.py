"""From records to the sceptic's answer: summary.json and summary.md."""

from __future__ import annotations

import collections
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jarm.data.files import replace_text
from jarm.records import plain
from jarm.statistics import (
    Interval,
    LabelSaving,
    area_under_curve,
    bootstrap_ci,
    interval,
    label_saving,
    number,
    paired_difference,
    seeds_to_see,
    simultaneous_ci,
    times_fewer,
    verdict,
)

METRIC = "spearman"
EFFECT = 0.01
"""The difference in mean Spearman that a comparison is asked to be able to see."""
SEEDS_TO_PLAN = 8
"""Fewer seeds say too little of their spread to plan with: at 8 it is known within a factor of 2."""
SHARE = "spearman_share"
BOUGHT = {
    "batch_diversity_log_det": "log det",
    "batch_diversity_distance": "mean distance",
    "batch_distinct_responses": "responses",
    "batch_distinct_prompts": "prompts",
    "batch_mean_fisher_weight": "Fisher weight",
    "batch_mean_member_variance": "variance",
    "batch_mean_gold_gap": "gold gap",
    "label_error": "wrong labels",
    "seconds_to_fit": "s to fit",
    "seconds_to_select": "s to select",
}
PROVENANCE = ("device", "versions", "commit", "config")


def runs_of(records: list[dict[str, Any]]) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """rule -> seed -> its records by round, of the runs that are whole: every round that any run has."""
    by_run: dict[str, dict[int, dict[int, dict[str, Any]]]] = {}
    for record in records:
        if record.get("kind", "run") == "run":
            by_run.setdefault(record["rule"], {}).setdefault(record["seed"], {})[record["round"]] = record
    rounds = sorted({t for seeds in by_run.values() for run in seeds.values() for t in run})
    return {
        rule: {seed: [run[t] for t in rounds] for seed, run in sorted(seeds.items()) if run.keys() == set(rounds)}
        for rule, seeds in by_run.items()
    }


def references_of(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name -> metrics of what needs no reward model."""
    return {record["rule"]: record for record in records if record.get("kind") == "reference"}


def best_of_names(records: list[dict[str, Any]]) -> list[str]:
    """The best-of-n metrics that have a value somewhere, smallest n first."""
    names = {
        name
        for record in records
        for name, value in record.items()
        if name.startswith("best_of_") and name[8:].isdigit() and value is not None
    }
    return sorted(names, key=lambda name: int(name[8:]))


def valued(record: dict[str, Any], metric: str) -> float:
    """A metric of a record, NaN where it has no value; Spearman with what is undefined of it, by prompt, as 0."""
    value, share = record.get(metric), record.get(SHARE) if metric == METRIC else None
    return math.nan if value is None else float(value) * (1.0 if share is None else float(share))


def curve(run: list[dict[str, Any]], metric: str) -> list[float]:
    """`valued` over rounds; Spearman without a value is 0, as for a model that knows nothing."""
    missing = 0.0 if metric == METRIC else math.nan
    return [missing if math.isnan(value) else value for value in (valued(record, metric) for record in run)]


def curves(runs: Mapping[int, list[dict[str, Any]]], metric: str, seeds: list[int]) -> np.ndarray:
    """`[S, T]` of some seeds."""
    return np.array([curve(runs[seed], metric) for seed in seeds], np.float64)


def summarise(records: list[dict[str, Any]], baseline: str = "random", *, planning: bool = True) -> dict[str, Any]:
    """All that `summary.md` says, as numbers.

    Each rule is compared with the baseline on the seeds that are whole for both. `area` is the area under the Spearman
    curve divided by its width in labels; a gain is a mean of paired differences with its 95 % bootstrap interval. A
    prompt whose Spearman correlation a model leaves undefined counts as 0: curves are of `spearman * spearman_share`,
    where records without a share have 1.

    Args:
      records: flat, one per rule, seed and round, with kind `run`; and one per reference line, with kind `reference`.
      baseline: name of the rule that others are compared with.
      planning: whether to say what all rules together show, and how many seeds would show a small difference.

    Returns:
      `rules`: rule -> its numbers and `verdict`; `reference`: name -> metrics; `provenance`; what was compared.
    """
    runs, best = runs_of(records), best_of_names(records)
    runs |= {r["rule"]: {} for r in records if r.get("kind") == "failed" and r["rule"] not in runs}
    shown = best[-1] if best else None
    base_runs = runs.get(baseline, {})
    rules = {rule: _rule(rule, runs[rule], baseline, base_runs, shown, planning * (len(runs) - 1)) for rule in runs}
    for rule, row in rules.items():
        begun = {r["seed"] for r in records if r.get("kind", "run") == "run" and r["rule"] == rule}
        failed = [r["message"] for r in records if r.get("kind") == "failed" and r["rule"] == rule]
        row |= {
            "unfinished_seeds": len(begun) - row["seeds"],
            "failed_seeds": len(failed),
            "failure": max(failed, default=None),
        }
    return _plain(
        {
            "baseline": baseline,
            "metric": METRIC,
            "best_of": shown,
            "best_of_left_out": max((r.get(f"{shown}_undefined") or 0 for r in records), default=0),
            "rules": rules,
            "reference": {
                name: {key: value for key, value in line.items() if key not in ("kind", "rule", *PROVENANCE)}
                for name, line in references_of(records).items()
            },
            "provenance": {name: _distinct(records, name) for name in PROVENANCE},
        }
    )


def _rule(
    rule: str,
    runs: Mapping[int, list[dict[str, Any]]],
    baseline: str,
    base_runs: Mapping[int, list[dict[str, Any]]],
    best: str | None,
    comparisons: int,
) -> dict[str, Any]:
    seeds, paired = list(runs), [seed for seed in runs if seed in base_runs]
    row: dict[str, Any] = {"seeds": len(seeds), "paired_seeds": len(paired)}
    if not seeds:
        return row | {"verdict": "nothing to compare: no run is whole"}
    labels = curves(runs, "labels", seeds).mean(0)

    def final(values: np.ndarray) -> np.ndarray:
        return values[:, -1]

    def area(values: np.ndarray) -> np.ndarray:
        return area_under_curve(labels, values)

    quantities: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
        "area": (METRIC, area),
        "final": (METRIC, final),
    }
    if best:
        quantities["final_best_of"] = (best, final)
    for name, (metric, take) in quantities.items():
        row[name] = bootstrap_ci(take(curves(runs, metric, seeds)))
        if paired:
            pair = take(curves(runs, metric, paired)), take(curves(base_runs, metric, paired))
            row[f"{name}_gain"] = paired_difference(*pair)
            if name == "area" and rule != baseline and comparisons:
                row["area_gain_together"] = simultaneous_ci(pair[0] - pair[1], comparisons)
                few = len(paired) < SEEDS_TO_PLAN
                row["seeds_to_see"] = math.nan if few else seeds_to_see(EFFECT, pair[0] - pair[1])
    row["labels"], row[METRIC] = labels, curves(runs, METRIC, seeds).mean(0)
    row |= {name: _mean(runs, name) for name in BOUGHT}
    row["least_spearman_share"] = _known(runs, SHARE).min(initial=1.0)
    row["label_error"] = _mean({seed: run[-1:] for seed, run in runs.items()}, "label_error")
    saving = None
    if paired:
        base_labels = curves(base_runs, "labels", paired).mean(0)
        pair = curves(runs, METRIC, paired), curves(base_runs, METRIC, paired)
        saving = label_saving(labels, pair[0], base_labels, pair[1])
        row |= {"saving": saving, "labels_needed": _labels(saving, rule == baseline)}
    gain = row.get("area_gain", Interval(math.nan, math.nan, math.nan, 0))
    row["verdict"] = "the baseline" if rule == baseline else verdict(gain, saving, baseline=baseline)
    return row


def _mean(runs: Mapping[int, list[dict[str, Any]]], name: str) -> float:
    """Mean over seeds and the rounds that have a value."""
    known = _known(runs, name)
    return float(known.mean()) if known.size else math.nan


def _known(runs: Mapping[int, list[dict[str, Any]]], name: str) -> np.ndarray:
    values = np.array([record.get(name) for run in runs.values() for record in run], np.float64)
    return values[~np.isnan(values)]


def _distinct(records: list[dict[str, Any]], name: str) -> list[Any]:
    values: list[Any] = []
    for record in records:
        if record.get(name) is not None and record[name] not in values:
            values.append(record[name])
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim):
        return [_plain(each) for each in value]
    return plain(value)


def write_summary(records: list[dict[str, Any]], out: pathlib.Path | str, baseline: str = "random") -> dict[str, Any]:
    """Write `summary.json` and `summary.md` into a folder; its `config.json`, if there, is quoted as the settings.

    Returns:
      What `summarise` returns, with `settings`.
    """
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    config = out / "config.json"
    settings = json.loads(config.read_text()) if config.exists() else {}
    summary = summarise(records, baseline) | {"settings": settings}
    replace_text(out / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    replace_text(out / "summary.md", markdown(summary))
    return summary


def write_sweep_summary(
    records: list[dict[str, Any]],
    settings: list[dict[str, Any]],
    out: pathlib.Path,
    baseline: str = "random",
) -> dict[str, Any]:
    """Write `summary.json` and `summary.md` of a sweep into its folder: each setting summarised as by `summarise`.

    Args:
      records: flat, each with its value on every axis; of kind `run`, `failed` or `reference`.
      settings: the values of every setting on the axes.
      out: the folder.
      baseline: name of the rule that others are compared with, within each setting.

    Returns:
      `settings`: for each of them its `axes` and the `rules` of `summarise`; and `provenance`.
    """
    axes = list(settings[0])
    by_setting: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        if record["kind"] != "reference":
            by_setting.setdefault(tuple(record[axis] for axis in axes), []).append(record)
    rows = [
        {"axes": setting, "rules": summarise(own, baseline, planning=False)["rules"]}
        for setting in settings
        if (own := by_setting.get(tuple(setting.values())))
    ]
    config = out / "config.json"
    summary = {
        "baseline": baseline,
        "settings": rows,
        "failures": dict(collections.Counter(line["message"] for line in records if line["kind"] == "failed")),
        "provenance": _plain({name: _distinct(records, name) for name in PROVENANCE}),
        "config": json.loads(config.read_text()) if config.exists() else {},
    }
    replace_text(out / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    replace_text(out / "summary.md", _sweep_markdown(summary, axes))
    return summary


def _sweep_markdown(summary: dict[str, Any], axes: list[str]) -> str:
    baseline, rows = summary["baseline"], summary["settings"]
    runs = sum(row["seeds"] for setting in rows for row in setting["rules"].values())
    text = [f"# {len(rows)} settings, {runs:,} runs", ""]
    text += [f"- {count:,} run{'s' * (count != 1)} failed: {failure}" for failure, count in summary["failures"].items()]
    text += _table(
        [
            *axes,
            "rule",
            "seeds",
            "failed",
            "area under Spearman curve",
            "final Spearman",
            f"labels to {baseline}'s end",
        ],
        [
            [
                *(str(value) for value in setting["axes"].values()),
                rule,
                str(row["seeds"]),
                str(row["failed_seeds"] or ""),
                *(_cell(row, name, rule == baseline) for name in ("area", "final")),
                row.get("labels_needed", "-"),
            ]
            for setting in rows
            for rule, row in setting["rules"].items()
        ],
    )
    text += [
        "",
        f"{baseline}: mean over seeds (95 % interval). Others: mean, then the difference from {baseline} in the same "
        "setting on the same seeds (95 % bootstrap interval over seeds; not corrected for comparing many). The area is "
        "the mean height of the learning curve over label counts.",
        "",
        "## Settings and provenance",
        "",
    ]
    text += [f"- {name}: {_inline(value)}" for name, value in {**summary["config"], **summary["provenance"]}.items()]
    return "\n".join(text) + "\n"


def markdown(summary: dict[str, Any]) -> str:
    """The text of `summary.md`."""
    rules, baseline, best = summary["rules"], summary["baseline"], summary["best_of"]
    counts = sorted({row["seeds"] for row in rules.values()})
    seeds = " to ".join(str(count) for count in ([counts[0], counts[-1]] if len(counts) > 1 else counts)) or "no"
    best_name = f"best of {best[8:]}" if best else "best of n"
    text = [f"# {len(rules)} acquisition rules, {seeds} seed{'s' * (counts != [1])}", ""]
    text += [f"- **{rule}**: {row['verdict']}{_seeds_note(row, baseline)}" for rule, row in rules.items()]
    text += ["", "## How fast each rule teaches", ""]
    text += _table(
        [
            "rule",
            "area under Spearman curve",
            "final Spearman",
            f"final {best_name}",
            f"labels to {baseline}'s final value",
            "all rules together",
            f"seeds to see {number(EFFECT, 2)}",
        ],
        [
            [
                rule,
                *(_cell(row, name, rule == baseline) for name in ("area", "final", "final_best_of")),
                row.get("labels_needed", "-"),
                *_together(row),
            ]
            for rule, row in rules.items()
        ],
    )
    text += [
        "",
        f"{baseline}: mean over seeds (95 % interval). Others: mean, then the difference from {baseline} on the same "
        "seeds (95 % bootstrap interval over seeds, of that rule alone). The area is the mean height of the learning "
        "curve over label counts. Labels are read off the curve averaged over seeds, where it first reaches the value "
        f"that {baseline} ends with; in brackets, the interval of how many times fewer than {baseline} needs, or more. "
        "All rules together: the difference in area, with intervals that all hold at once with 95 % (Bonferroni's, by "
        f"Student's t). Seeds: how many would see a difference in area of {number(EFFECT, 2)} with a chance of 80 % at "
        "the 5 % level, by the spread of these. Intervals are over label seeds only: the test prompts and the pool are "
        "fixed. Where a model leaves the Spearman correlation of a test prompt undefined (predictions all equal, or "
        "not a number), it counts as 0.",
        *_left_out(summary["best_of_left_out"], best_name),
        "",
        "## What each rule buys",
        "",
    ]
    text += _table(
        ["rule", *BOUGHT.values()],
        [[rule, *(_number(row.get(name)) for name in BOUGHT)] for rule, row in rules.items()],
    )
    text += [
        "",
        "Means over rounds and seeds. log det and mean distance: diversity of a batch in embedding space; responses "
        "and prompts: how many distinct ones a batch holds; Fisher weight: p (1 - p) under the model that chose; "
        "variance: of a pair's reward difference over the members of the ensemble; gold gap: between the two "
        "responses, in units of the annotator's scale; wrong labels: share of all labels bought "
        "that go against the gold order.",
        "",
        "## Without a reward model",
        "",
    ]
    columns = {
        METRIC: "Spearman",
        **({best: best_name} if best else {}),
        "pair_accuracy": "pair accuracy",
        "nll": "nll",
    }
    text += _table(
        ["line", *columns.values()],
        [
            [name, *(_number(plain(valued(line, key))) for key in columns)]
            for name, line in summary["reference"].items()
        ],
    )
    text += ["", "## Settings and provenance", ""]
    settings = summary.get("settings", {})
    text += [f"- {name}: {_inline(value)}" for name, value in {**settings, **summary["provenance"]}.items()]
    return "\n".join(text) + "\n"


def _seeds_note(row: dict[str, Any], baseline: str) -> str:
    notes = []
    if row["paired_seeds"] < row["seeds"]:
        notes.append(f"compared on the {row['paired_seeds']} of its {row['seeds']} seeds that {baseline} has too")
    if row["unfinished_seeds"]:
        notes.append(f"{row['unfinished_seeds']} unfinished left out")
    if row["failed_seeds"]:
        notes.append(f"{row['failed_seeds']} failed: {row['failure']}")
    if row.get("least_spearman_share", 1) < 1:
        share = math.floor(100 * row["least_spearman_share"])
        notes.append(f"ranks only {share}% of the test prompts in some round, the others count as Spearman 0")
    return f" [{'; '.join(notes)}]" if notes else ""


def _left_out(prompts: int, best_name: str) -> list[str]:
    if not prompts:
        return []
    some = f"{prompts} test prompt{'s' * (prompts > 1)}"
    return ["", f"The {best_name} leaves out {some}, with fewer responses or predictions that are not a number."]


def _number(value: float | None) -> str:
    return "-" if value is None else number(value)


def _float(value: float | None) -> float:
    return math.nan if value is None else value


def _cell(row: dict[str, Any], name: str, baseline: bool) -> str:
    if row.get(name) is None:
        return "-"
    if baseline or f"{name}_gain" not in row:
        mean, low, high = (_float(row[name][key]) for key in ("mean", "low", "high"))
        return f"{number(mean)} {interval(low, high)}" if row["seeds"] > 1 else number(mean)
    mean, low, high = (_float(row[f"{name}_gain"][key]) for key in ("mean", "low", "high"))
    ends = f" {interval(low, high)}" if row["paired_seeds"] > 1 else ""
    return f"{_number(row[name]['mean'])}, {'+' if mean >= 0 else ''}{number(mean)}{ends}"


def _together(row: dict[str, Any]) -> list[str]:
    """The gain with the interval that holds for all rules, and the seeds that would see a small one."""
    gain = row.get("area_gain_together")
    if gain is None:
        return ["-", "-"]
    mean, low, high = (_float(gain[name]) for name in ("mean", "low", "high"))
    ends = f" {interval(low, high)}" if row["paired_seeds"] > 1 else ""
    seeds = row["seeds_to_see"]
    return [f"{'+' if mean >= 0 else ''}{number(mean)}{ends}", "-" if seeds is None else f"{seeds:,.0f}"]


def _labels(saving: LabelSaving, baseline: bool) -> str:
    if math.isinf(saving.labels):
        return f"not within {saving.limit:.0f}"
    _, ends, which = times_fewer(saving)
    return f"{saving.labels:.0f}" + (f" ({ends} times {which})" if ends and not baseline else "")


def _inline(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(_inline(each) for each in value) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_inline(each)}" for name, each in value.items()) or "-"
    return "-" if value is None else f"`{value}`"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
