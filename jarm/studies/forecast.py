"""`jarm forecast`: how many labels will active choice save on these embeddings, before anything is labelled?

Gold rewards are drawn from a family of teachers (`jarm.data.teachers`), and each way of choosing pairs is run on each
draw. With some labelled pairs, teachers count by the probability that they give these labels.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jarm.core.base import HParams
from jarm.core.checks import INT32, Check, between, check_fields
from jarm.core.files import claim, described, make_folder, plain, refuse_link, write_whole
from jarm.core.outside import mapping, read_json
from jarm.core.status import JarmError
from jarm.core.tables import ResponseTable, TrainTest
from jarm.data.datasets import load
from jarm.data.metric import read_metric, within_metric
from jarm.data.standardise import standardised
from jarm.data.tables import check_sides, split_by, whole_table
from jarm.data.teachers import Teacher, TeacherSpace, family, teacher_space
from jarm.loop.config import FIRST, LoopConfig
from jarm.loop.device_table import check_run, limit_per_prompt
from jarm.report.figures import require_matplotlib
from jarm.report.forecast import Saved, forecast_figure, forecast_in_words, forecast_text, labels_saved, quantiles
from jarm.runs.config import COMPARE_CHECKS, CompareConfig, documented_by, known_names, parts
from jarm.runs.records import CONFIG, provenance
from jarm.runs.simulated import simulate
from jarm.studies.weighing import allocate, read_labels, teacher_weights

WRITTEN = ("forecast.json", "forecast.md", "forecast.png", "forecast.svg")
BASELINE = "random+random"
SOURCE = ("data", "embeddings", "standardise", "allow_leakage", "gen", "emb", "task")
SHARED = ("pairs", "rounds", "batch", "initial", "candidates", "prior_variance", "evidence", "metric")


def _firsts(name: str, text: str) -> None:
    for first in parts(name, text):
        if first not in FIRST:
            raise JarmError(f"{name} holds {first!r}: choose from {', '.join(FIRST)}.")


FORECAST_CHECKS: Mapping[str, Check] = {
    **{name: COMPARE_CHECKS[name] for name in ("pairs", "batch", "initial", "candidates", "metric", "workers")},
    "rules": known_names,
    "rounds": between(1, INT32),
    "firsts": _firsts,
    "campaigns": between(1, INT32),
    "seed": between(0, INT32),
}
"""Option of `jarm forecast` -> the check of its values."""


@documented_by(CompareConfig)
@dataclasses.dataclass(frozen=True)
class ForecastConfig:
    """Settings of a forecast; the defaults finish in about two minutes on two cores.

    The learner is a laplace head, with one metric. Ways of choosing are all combinations of `firsts` and `rules`;
    random pairs throughout are always among them, as the baseline.

    Example:
      >>> ForecastConfig(rules="random,v_opt", firsts="random,v_opt").arms()
      ['random+random', 'random+v_opt', 'v_opt+random', 'v_opt+v_opt']

    Attributes:
      data: "synthetic" (built in), a Parquet or JSONL table of responses, or a folder in the layout
        embd_{gen}_{emb}_{task}_{split}.npy. Gold rewards in it are not read.
      labels: a Parquet or JSONL file of labelled pairs, by which teachers are weighed: `first` and `second`, numbers of
        responses of the table from 0, and `label`, the probability that the first is preferred, such as 1 or 0.
      out: folder for forecast.json, forecast.md, forecast.png and forecast.svg.
      candidates: candidate pairs drawn at random per round; 0 considers every pair. Fewer than `jarm compare` takes:
        most of a campaign's time goes into them.
      firsts: ways to choose the first pairs, separated by commas: "random", "d_opt", "v_opt".
      rules: acquisition rules of the later batches, separated by commas; `jarm rules` lists them.
      campaigns: number of simulated campaigns, of all ways of choosing together.
      seed: of the draws, the labels and the candidates.
      workers: calls at a time; 0 takes one per core on a CPU, else 1.
    """

    data: str = "synthetic:hidden"
    embeddings: str | None = None
    labels: str | None = None
    standardise: bool = True
    metric: str = "within:2:64"
    allow_leakage: bool = False
    gen: str | None = None
    emb: str | None = None
    task: str | None = None
    out: pathlib.Path = pathlib.Path("out/forecast")
    firsts: str = "random,v_opt"
    rules: str = "random,v_opt"
    pairs: str = "within"
    rounds: int = 8
    batch: int = 50
    initial: int = 50
    candidates: int = 2000
    prior_variance: float = float(HParams().prior_variance)
    evidence: bool = False
    campaigns: int = 2000
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        check_fields(self, FORECAST_CHECKS)
        object.__setattr__(self, "metric", str(read_metric(self.metric) or "none"))
        for first in self.first_names():
            self.loop(first)

    def first_names(self) -> list[str]:
        """Ways to choose the first pairs, `random` first."""
        return list(dict.fromkeys(["random", *parts("`firsts`", self.firsts)]))

    def rule_names(self) -> list[str]:
        """Names of the rules, `random` first."""
        return self._compared("random").rule_names()

    def arms(self) -> list[str]:
        """Ways of choosing, as FIRST+RULE, the baseline first."""
        return [f"{first}+{rule}" for first in self.first_names() for rule in self.rule_names()]

    def loop(self, first: str) -> LoopConfig:
        """The loop of all arms with one way to choose the first pairs; random pairs after those that are chosen."""
        loop = self._compared(first).loop()
        if first == "random":
            return loop
        return dataclasses.replace(loop, rules=("then_random", *loop.rules[1:]))

    def loops(self, train: ResponseTable) -> dict[str, LoopConfig]:
        """Name of a way to choose the first pairs -> its loop, with the limit per prompt that the table allows."""
        found = {first: self.loop(first) for first in self.first_names()}
        return {
            first: dataclasses.replace(loop, per_prompt=limit_per_prompt(loop, train)) for first, loop in found.items()
        }

    def hparams(self) -> HParams:
        """The traced numbers, but for the noise, which is the teachers'."""
        return self._compared("random").hparams()

    def _compared(self, first: str) -> CompareConfig:
        shared = {name: getattr(self, name) for name in SHARED}
        return CompareConfig(rules=self.rules, first=first, head="laplace", members=1, seeds=1, **shared)


def forecast(config: ForecastConfig) -> dict[str, Any]:
    """Forecast the labels that each way of choosing pairs will save, and write the folder of the forecast.

    Args:
      config: the settings.

    Returns:
      The summary, as in `forecast.json`.

    Raises:
      JarmError: the settings, the data, the labels or the folder are at fault; the message says which and what to do.

    Example:
      >>> import pathlib, tempfile
      >>> from jarm import ForecastConfig, forecast
      >>> sizes = {"rounds": 1, "batch": 5, "initial": 10, "candidates": 100, "rules": "random", "campaigns": 16}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     summary = forecast(ForecastConfig(out=pathlib.Path(folder) / "small", **sizes))
      >>> list(summary["arms"])  # beside random pairs throughout
      ['v_opt+random']
    """
    require_matplotlib()
    plain_tables = read_tables(config)
    tables = plain_tables
    if (metric := read_metric(config.metric)) is not None:
        tables = within_metric(plain_tables, metric)
    loops = config.loops(tables.train)
    for loop in loops.values():
        check_run(loop, dataclasses.replace(tables.train, gold=None), config.hparams())
    labels = None if config.labels is None else read_labels(config.labels, tables)
    try:
        make_folder(config.out)
        with claim(config.out):
            _match_folder(config, _settings(config, plain_tables))
            space = teacher_space(plain_tables, config.seed)
            teachers = family(length=space.length is not None)
            weights = teacher_weights(space, teachers, labels)
            draws = max(1, config.campaigns // len(config.arms()))
            which, importance = allocate(teachers, weights, draws, config.seed)
            drawn = [teachers[at] for at in which]
            curves = simulate(loops, config.hparams(), tables, space, drawn, seed=config.seed, workers=config.workers)
            summary = summarise(config, space, teachers, weights, which, importance, curves)
            summary["labels_given"] = 0 if labels is None else len(labels.label)
            _write(config, summary)
    except OSError as error:
        raise JarmError(f"The folder {config.out} cannot be used ({error}): give another --out.") from error
    return summary


def read_tables(config: ForecastConfig) -> TrainTest:
    """The tables of a forecast, without metric; a table needs no column of gold rewards."""
    source = {name: getattr(config, name) for name in SOURCE}
    if config.embeddings is None:
        return load(source.pop("data"), **source)
    whole = whole_table(config.data, config.embeddings, None, allow_leakage=config.allow_leakage)
    tables = check_sides(split_by(whole.table, whole.is_test), config.data)
    return standardised(tables) if config.standardise else tables


def summarise(
    config: ForecastConfig,
    space: TeacherSpace,
    teachers: Sequence[Teacher],
    weights: np.ndarray,
    which: np.ndarray,
    importance: np.ndarray,
    curves: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """The summary of a forecast.

    Args:
      config: the settings.
      space, teachers, weights: the family, `[C]` its probabilities.
      which, importance: `[D]` teacher and weight of each draw, as `allocate` returns them.
      curves: arm -> `[D, T + 1]`.
    """
    whole = np.all([np.isfinite(each).all(axis=1) for each in curves.values()], axis=0)
    if not whole.any():
        lost = [arm for arm, each in curves.items() if not np.isfinite(each).all(axis=1).any()]
        which_ones = " and ".join(lost) or "every way of choosing"
        raise JarmError(f"No campaign ran to its end with {which_ones}: leave it out of `--rules` or `--firsts`.")
    curves, which, importance = {arm: each[whole] for arm, each in curves.items()}, which[whole], importance[whole]
    labels = config.initial + config.batch * np.arange(config.rounds + 1)
    arms = [arm for arm in curves if arm != BASELINE]

    def saved(arm: str, some: Any = slice(None), last: int | None = None) -> Saved:
        own, baseline = curves[arm][some, :last], curves[BASELINE][some, :last]
        return labels_saved(labels[:last], own, baseline, importance[some], config.seed)

    cells = list[dict[str, Any]]()
    for shape, noise in dict.fromkeys((teacher.shape, teacher.noise) for teacher in teachers):
        inside = np.array([(teacher.shape, teacher.noise) == (shape, noise) for teacher in teachers])
        if importance[some := inside[which]].any():
            cells.append(
                {
                    "shape": shape,
                    "noise": noise,
                    "dimension": space.dimension(shape),
                    "weight": float(weights[inside].sum()),
                    "draws": int(some.sum()),
                    "arms": {arm: _row(saved(arm, some)) for arm in arms},
                }
            )
    expected = {arm: saved(arm) for arm in arms}
    sizes = np.array([cell["weight"] for cell in cells])
    ranges = {
        arm: quantiles(np.array([cell["arms"][arm]["ratio"] for cell in cells]), sizes, (0.1, 0.9)) for arm in arms
    }
    shares = importance / importance.sum()
    useful = [arm for arm in arms if expected[arm].verdict == "choose"] or arms
    return {
        "answer": forecast_in_words(expected, ranges, config.labels is not None, int(len(curves) * len(whole))),
        "best": max(useful, key=lambda arm: expected[arm].gain.mean),
        "campaigns": int(len(curves) * len(whole)),
        "draws": len(whole),
        "failed": int((~whole).sum()),
        "teachers": len(teachers),
        "labels": labels.tolist(),
        "spearman": {arm: (shares @ each).tolist() for arm, each in curves.items()},
        "arms": {
            arm: _row(expected[arm])
            | {
                "range": ranges[arm],
                "budgets": [
                    {"budget": int(labels[last - 1])} | _row(saved(arm, last=last))
                    for last in range(2, len(labels) + 1)
                ],
            }
            for arm in arms
        },
        "levels": {
            name: {
                str(level): float(weights[[getattr(teacher, name) == level for teacher in teachers]].sum())
                for level in dict.fromkeys(getattr(teacher, name) for teacher in teachers)
            }
            for name in Teacher._fields
        },
        "cells": cells,
    }


def _row(saved: Saved) -> dict[str, Any]:
    (ratio, ratio_low, ratio_high, _), (gain, gain_low, gain_high, _) = saved.saving.ratio, saved.gain
    row = {
        "ratio": ratio,
        "ratio_low": ratio_low,
        "ratio_high": ratio_high,
        "bound": saved.saving.bound,
        "gain": gain,
        "gain_low": gain_low,
        "gain_high": gain_high,
        "ahead": saved.ahead,
        "labels": saved.saving.labels,
        "baseline_labels": saved.saving.baseline_labels,
        "verdict": saved.verdict,
    }
    return {name: plain(value) for name, value in row.items()}


def _settings(config: ForecastConfig, tables: TrainTest) -> dict[str, Any]:
    """What the numbers of a folder depend on, as JSON."""
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    settings = {name: value for name, value in options.items() if name not in ("out", "workers")}
    settings["tables"] = [table.provenance for table in tables]
    settings["labelled"] = {} if config.labels is None else described(labels=config.labels)
    return dict(json.loads(json.dumps(settings, default=str)))


def _match_folder(config: ForecastConfig, settings: dict[str, Any]) -> None:
    """Refuse a folder that holds another forecast, or files that may be the user's."""
    path = config.out / CONFIG
    for name in (CONFIG, *WRITTEN):
        refuse_link(config.out / name)
        if not path.is_file() and (config.out / name).exists():
            raise JarmError(
                f"{config.out / name} stands there without a config.json and may be yours: give another --out."
            )
    if path.is_file():
        there = read_json(path, mapping(), cure="put it right, or give another --out")
        other = sorted(name for name in there.keys() | settings.keys() if there.get(name) != settings.get(name))
        if other:
            shown = ", ".join(f"{name} {there.get(name)!r} there, {settings.get(name)!r} here" for name in other[:4])
            raise JarmError(
                f"The folder {config.out} holds a forecast with other settings ({shown}): give another --out, or the "
                "same settings."
            )
    write_whole(path, json.dumps(settings, indent=2) + "\n")


def _write(config: ForecastConfig, summary: dict[str, Any]) -> None:
    summary |= provenance()
    write_whole(config.out / "forecast.json", json.dumps(summary, indent=1) + "\n")
    write_whole(config.out / "forecast.md", forecast_text(summary))
    forecast_figure(summary, config.out / "forecast")
