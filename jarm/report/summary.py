"""From records to the answer of a comparison: summary.json and summary.md."""

from __future__ import annotations

import collections
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jarm.core.files import make_folder, plain_tree, write_whole
from jarm.core.outside import read_json
from jarm.report.answer import answer, answer_of_sweep
from jarm.report.curves import METRIC, SHARE, WORDS, best_of_names, curves, noise_free, references_of, runs_of
from jarm.report.markdown import BATCH_COLUMNS, EFFECT, comparison_text, sweep_text
from jarm.report.saturation import left_in_sweep, left_to_learn
from jarm.report.statistics import (
    Interval,
    LabelSaving,
    area_under_curve,
    bootstrap_ci,
    label_saving,
    paired_difference,
    seeds_to_see,
    simultaneous_ci,
    times_fewer,
    verdict,
)

SEEDS_TO_PLAN = 8
"""Minimum number of seeds to plan with: 8 give their spread within a factor of 2."""
PROVENANCE = ("device", "versions", "commit", "config")
"""Fields of a record that say where it comes from."""


def summarise(
    records: list[dict[str, Any]], baseline: str = "random", *, settings: int | None = None, metric: str = METRIC
) -> dict[str, Any]:
    """The numbers behind `summary.md`.

    Each rule is compared with the baseline on the seeds whose runs are whole for both. `area` is the area under the
    Spearman curve divided by its width in labels; a gain is a mean of paired differences with its 95 % bootstrap
    interval. A test prompt with an undefined Spearman correlation counts as 0: curves show `spearman * spearman_share`,
    and a record without a share has 1.

    Args:
      records: flat, one per rule, seed and round, with kind `run`; and one per reference line, with kind `reference`.
      baseline: name of the rule that others are compared with.
      settings: of a sweep, the number of settings whose intervals are read together with these; None for a comparison,
        which also says how many seeds would show a small difference.
      metric: of the curves; of a metric that is not Spearman, read area under its curve, and so on.

    Returns:
      `answer`: in a sentence or two, None of a setting of a sweep; `left_to_learn`: as that function returns it;
      `rules`: rule -> its numbers and `verdict`;
      `reference`: name -> metrics; `provenance`; what was compared.
    """
    runs, best = runs_of(records), best_of_names(records)
    runs |= {r["rule"]: {} for r in records if r.get("kind") == "failed" and r["rule"] not in runs}
    shown = best[-1] if best else None
    base_runs = runs.get(baseline, {})
    together = (settings or 1) * (len(runs) - 1)
    rules = {rule: _rule(rule, runs[rule], baseline, base_runs, shown, together, metric) for rule in runs}
    for rule, row in rules.items():
        begun = {r["seed"] for r in records if r.get("kind", "run") == "run" and r["rule"] == rule}
        failed = [r["message"] for r in records if r.get("kind") == "failed" and r["rule"] == rule]
        row |= {
            "unfinished_seeds": len(begun) - row["seeds"],
            "failed_seeds": len(failed),
            "failure": max(failed, default=None),
        }
    rules = plain_tree(rules)
    return plain_tree(
        {
            "answer": answer(rules, baseline, metric) if settings is None else None,
            "left_to_learn": left_to_learn(base_runs, references_of(records), baseline, settings or 1, metric),
            "baseline": baseline,
            "metric": metric,
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
    curve_of: str,
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
        "area": (curve_of, area),
        "final": (curve_of, final),
    }
    if best:
        quantities["final_best_of"] = (best, final)
    for name, (metric, take) in quantities.items():
        row[name] = bootstrap_ci(take(curves(runs, metric, seeds)))
        if paired:
            pair = take(curves(runs, metric, paired)), take(curves(base_runs, metric, paired))
            row[f"{name}_gain"] = paired_difference(*pair)
            if name == "area" and rule != baseline:
                row["area_gain_together"] = simultaneous_ci(pair[0] - pair[1], comparisons)
                few = len(paired) < SEEDS_TO_PLAN
                row["seeds_to_see"] = math.nan if few else seeds_to_see(EFFECT, pair[0] - pair[1])
    refits = {seed: value for seed, run in runs.items() if not math.isnan(value := noise_free(run, curve_of))}
    if refits:
        values, ends = np.array(list(refits.values())), final(curves(runs, curve_of, list(refits)))
        row |= {"noise_free": bootstrap_ci(values), "noise_free_gain": paired_difference(values, ends)}
    row["labels"], row[curve_of] = labels, curves(runs, curve_of, seeds).mean(0)
    row |= {name: _mean(runs, name) for name in BATCH_COLUMNS}
    row["least_spearman_share"] = _known(runs, SHARE).min(initial=1.0)
    row["label_error"] = _mean({seed: run[-1:] for seed, run in runs.items()}, "label_error")
    saving = None
    if paired:
        base_labels = curves(base_runs, "labels", paired).mean(0)
        pair = curves(runs, curve_of, paired), curves(base_runs, curve_of, paired)
        saving = label_saving(labels, pair[0], base_labels, pair[1])
        row |= {"saving": saving, "labels_needed": labels_needed(saving, rule == baseline)}
    gain = row.get("area_gain", Interval(math.nan, math.nan, math.nan, 0))
    row["verdict"] = "the baseline" if rule == baseline else _verdict(gain, saving, baseline, curve_of)
    return row


def _verdict(gain: Interval, saving: LabelSaving | None, baseline: str, metric: str) -> str:
    return verdict(gain, saving, baseline=baseline, metric=f"mean {WORDS[metric]}")


def _mean(runs: Mapping[int, list[dict[str, Any]]], name: str) -> float:
    """Mean over seeds and the rounds that have a value."""
    known = _known(runs, name)
    return float(known.mean()) if known.size else math.nan


def _known(runs: Mapping[int, list[dict[str, Any]]], name: str) -> np.ndarray:
    values = np.array([record.get(name) for run in runs.values() for record in run], np.float64)
    return values[~np.isnan(values)]


def _distinct(records: list[dict[str, Any]], name: str) -> list[Any]:
    """Values of a field in the order of the records; a commit that is not known is `unknown` beside others."""
    values: list[Any] = []
    for record in records:
        if (value := record.get(name)) is not None and value not in values:
            values.append(value)
    if name == "commit" and values and any(record.get(name, "") is None for record in records):
        values.append("unknown")
    return values


def write_summary(
    records: list[dict[str, Any]],
    out: pathlib.Path | str,
    baseline: str = "random",
    *,
    metric: str = METRIC,
    amend: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write `summary.json` and `summary.md` into a folder; its `config.json`, if there, is quoted as the settings.

    Args:
      records, baseline, metric: as for `summarise`.
      out: the folder.
      amend: the result of `summarise` -> what is written in its place.

    Returns:
      What `summarise` returns, with `settings`.
    """
    out = pathlib.Path(out)
    make_folder(out)
    config = out / "config.json"
    settings = read_json(config) if config.exists() else {}
    summary = summarise(records, baseline, metric=metric) | {"settings": settings}
    if amend is not None:
        summary = plain_tree(amend(summary))
    write_whole(out / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    write_whole(out / "summary.md", comparison_text(summary))
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
      `answer`: in a sentence or two; `left_to_learn`: in how many settings nothing is, or None; `settings`: for each of
      them its `axes`, and `left_to_learn` and `rules` of `summarise`; and `provenance`.
    """
    axes = list(settings[0])
    by_setting: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    lines = [record for record in records if record["kind"] == "reference"]
    for record in records:
        if record["kind"] != "reference":
            by_setting.setdefault(tuple(record[axis] for axis in axes), []).append(record)
    rows = []
    for setting in settings:
        if own := by_setting.get(tuple(setting.values())):
            # A reference line has the axes that it depends on.
            own += [line for line in lines if all(line[axis] == setting[axis] for axis in axes if axis in line)]
            summary = summarise(own, baseline, settings=len(by_setting))
            rows.append({"axes": setting} | {name: summary[name] for name in ("left_to_learn", "rules")})
    config = out / "config.json"
    summary = {
        "answer": answer_of_sweep([row["rules"] for row in rows], baseline),
        "left_to_learn": left_in_sweep([row["left_to_learn"] for row in rows]),
        "baseline": baseline,
        "settings": rows,
        "failures": dict(collections.Counter(line["message"] for line in records if line["kind"] == "failed")),
        "provenance": plain_tree({name: _distinct(records, name) for name in PROVENANCE}),
        "config": read_json(config) if config.exists() else {},
    }
    write_whole(out / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    write_whole(out / "summary.md", sweep_text(summary))
    return summary


def labels_needed(saving: LabelSaving, baseline: bool) -> str:
    """Labels to the baseline's final value, for a cell of a table: `138 (1.2 to 4.2 times fewer)`, `50 or fewer`."""
    if math.isinf(saving.labels):
        return f"not within {saving.limit:.0f}"
    _, ends, which = times_fewer(saving)
    needed = f"{saving.labels:.0f}{' or fewer' * (saving.bound == 'or more')}"
    return needed + (f" ({ends} times {which})" if ends and not baseline else "")
