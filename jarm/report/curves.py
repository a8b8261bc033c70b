"""From records to learning curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jarm.report.statistics import area_under_curve

METRIC = "spearman"
"""The default metric of a curve."""
ACCURACY = "pair_accuracy"
"""The metric of curves on recorded pairs."""
WORDS = {METRIC: "Spearman", ACCURACY: "accuracy"}
"""Metric of a curve -> its word in sentences and tables."""
SHARE = "spearman_share"
"""Field of a record: the share of test prompts whose Spearman correlation is defined."""
NOISE_FREE = "noise_free_"
"""Beginning of the fields of a run's last record that hold the metrics of the noise-free refit."""


def runs_of(records: list[dict[str, Any]]) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """rule -> seed -> records in the order of rounds, of whole runs: those with every round that any run has."""
    by_run: dict[str, dict[int, dict[int, dict[str, Any]]]] = {}
    for record in records:
        if record.get("kind", "run") == "run":
            by_run.setdefault(record["rule"], {}).setdefault(record["seed"], {})[record["round"]] = record
    rounds = sorted({t for seeds in by_run.values() for run in seeds.values() for t in run})
    return {
        rule: {seed: [run[t] for t in rounds] for seed, run in sorted(seeds.items()) if run.keys() == set(rounds)}
        for rule, seeds in by_run.items()
    }


def by_rule(records: list[dict[str, Any]], rules: Sequence[str]) -> list[dict[str, Any]]:
    """Records in the order of the rules, whenever they were made; references first."""
    places = {rule: place for place, rule in enumerate(rules)}
    return sorted(records, key=lambda record: places.get(record["rule"], -1))


def references_of(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name -> metrics of the reference lines, which need no reward model."""
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
    """A metric of a record, NaN without a value; test prompts with an undefined Spearman correlation count as 0."""
    value, share = record.get(metric), record.get(SHARE) if metric == METRIC else None
    return math.nan if value is None else float(value) * (1.0 if share is None else float(share))


def curve(run: list[dict[str, Any]], metric: str) -> list[float]:
    """`valued` over rounds; Spearman without a value is 0, as of a model that knows nothing."""
    missing = 0.0 if metric == METRIC else math.nan
    return [missing if math.isnan(value) else value for value in (valued(record, metric) for record in run)]


def curves(runs: Mapping[int, list[dict[str, Any]]], metric: str, seeds: list[int]) -> np.ndarray:
    """Curves `[S, T]` of some seeds."""
    return np.array([curve(runs[seed], metric) for seed in seeds], np.float64)


def noise_free(run: list[dict[str, Any]], metric: str = METRIC) -> float:
    """The metric of a run's noise-free refit as `curve` takes it; NaN where it failed, or in older runs."""
    refit = {name.removeprefix(NOISE_FREE): value for name, value in run[-1].items() if name.startswith(NOISE_FREE)}
    return math.nan if all(value is None for value in refit.values()) else curve([refit], metric)[0]


def area(run: list[dict[str, Any]], metric: str = METRIC) -> float:
    """Mean height of a run's curve over label counts."""
    labels = np.array([record["labels"] for record in run], np.float64)
    return float(area_under_curve(labels, np.array([curve(run, metric)]))[0])
