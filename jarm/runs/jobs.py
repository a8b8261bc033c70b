"""Jobs of a grid: settings that share program and data, checked against the data, and the calls that run them."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from jarm.acquisition.registry import RULES, get_rule
from jarm.core.base import HParams
from jarm.core.columns import differ
from jarm.core.memory import refuse_too_large
from jarm.core.status import JarmError
from jarm.core.tables import TrainTest
from jarm.data.datasets import load
from jarm.data.readers import read_columns
from jarm.data.sources import are_pairs
from jarm.data.tables import choice
from jarm.evaluation.ceiling import NAMES, linear_scores
from jarm.evaluation.metrics import reference_lines
from jarm.loop.config import LoopConfig
from jarm.loop.device_table import DeviceTable, check_run, limit_per_prompt, make_device_table
from jarm.loop.loop import make_loop
from jarm.runs.config import CompareConfig
from jarm.runs.grid import Setting, by_program
from jarm.runs.programs import free_bytes
from jarm.runs.results import Result, evaluate_runs


@dataclasses.dataclass(frozen=True)
class Job:
    """Settings that share program and data, checked and ready to run: they differ in traced numbers.

    Attributes:
      settings: the settings.
      loop: the loop that is compiled.
      best_of: sizes of best-of-N, or None for the sizes that suit the test table.
      data: training and test table.
      scale: divisor of the column that the annotator answers by.
      hparams: numbers of each setting.
      offers_all: whether all pairs of the tables are on offer, and in the test.
    """

    offers_all: ClassVar[bool] = True

    settings: Sequence[Setting]
    loop: LoopConfig
    best_of: tuple[int, ...] | None
    data: TrainTest
    scale: float
    hparams: Sequence[HParams]

    @property
    def program(self) -> tuple[Any, ...]:
        """Key of the program: jobs with equal keys share one."""
        return self.loop, self.data.train.shape, self.data.train.alike is None

    @property
    def evaluation(self) -> dict[str, Any]:
        """Arguments of `evaluate` that all runs share, without the noise."""
        return {"annotator": self.loop.annotator, "scale": self.scale, "best_of": self.best_of}

    @property
    def reference_names(self) -> tuple[str, ...]:
        """Names of the lines of `references`."""
        return "oracle", "mean response", *NAMES, *self.data.test.attributes

    def references(self, noise: float | None, linear: dict[int, dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
        """Metrics of scores without labels, by name.

        Args:
          noise: beta of the annotator, or None to leave out metrics that it decides.
          linear: data -> scores of linear heads, which jobs on the same data share; filled here.
        """
        if id(self.data) not in linear:
            linear[id(self.data)] = linear_scores(self.data)
        return reference_lines(self.data.test, noise=noise, scores=linear[id(self.data)], **self.evaluation)

    def device_table(self) -> DeviceTable:
        """The training table, on the device."""
        annotator = self.loop.annotator
        return make_device_table(self.data.train, self.scale, annotator.column, annotator.scale)

    def evaluate(self, results: Sequence[Result], pad: int) -> list[dict[str, np.ndarray]]:
        """Metrics of all heads of some runs, as `evaluate_runs` returns them."""
        return evaluate_runs(self.loop.head.head(), results, self.data.test, pad=pad, **self.evaluation)

    def place(self, at: int) -> dict[str, Any]:
        """Fields of records that tell a setting from others, and its rounds, which an axis may set by another name."""
        return self.settings[at].axes | {"rounds": self.loop.rounds}

    def runs(self, seeds: int) -> list[tuple[int, int]]:
        """Every (seed, index of a setting)."""
        return [(seed, at) for seed in range(seeds) for at in range(len(self.settings))]


class Call(NamedTuple):
    """One call of a job's program: one rule on some runs, each a (seed, index of a setting)."""

    job: Job
    rule: str
    runs: Sequence[tuple[int, int]]


class Made(NamedTuple):
    """A call that was made: the records of each of its runs, and the provenance of another process that made them."""

    call: Call
    runs: list[list[dict[str, Any]]]
    by: dict[str, Any] | None = None


def read_jobs(settings: Sequence[Setting]) -> list[Job]:
    """Jobs of settings with their data, so that mistakes are refused before anything runs.

    Raises:
      JarmError: an option, a value, the data or a setting is at fault; the message says which, and what to do.
    """
    for rule in settings[0].config.rule_names():
        get_rule(rule)  # runs the file of a rule of yours
    jobs, loaded, noises = [], dict[tuple[Any, ...], TrainTest](), dict[tuple[Any, ...], Any]()
    for shared in by_program(settings):
        first, source, hparams = shared[0], tuple(shared[0].source.values()), list[HParams]()
        with first.named_in_errors():
            _refuse_unscored(first.config)
            data = loaded[source] = loaded[source] if source in loaded else load(**first.source)
            if data.test.alike is not None and not differ(data.test.alike, data.test.mask, "within"):
                raise JarmError(
                    "The embeddings of the test prompts are equal in every pair within prompts, so no model can be "
                    "told from another: embed the prompt and its response together, and check that texts differ before "
                    "they are cut."
                )
            if taken := [name for name in data.test.attributes if name in RULES]:
                raise JarmError(
                    f"The attribute {taken[0]!r} has the name of a rule, and records tell rules and reference lines by "
                    "name: give the column another name."
                )
        for setting in shared:
            with setting.named_in_errors():
                # Solving for the noise of a flip rate takes a while: once for each rate, column, scale, kind of pairs.
                loop, numbers = setting.config.loop(), setting.config.hparams()
                annotator = loop.annotator
                solved = annotator.kind == "bradley_terry" and annotator.flip_rate is not None
                key = source, annotator.scale, annotator.column, loop.pairs, annotator.flip_rate
                if solved and key in noises:
                    loop, numbers = setting.loop, dataclasses.replace(numbers, noise=noises[key])
                scale, numbers = check_run(loop, data.train, numbers)
                if solved:
                    noises[key] = numbers.noise
                hparams.append(numbers)
        with first.named_in_errors():
            refuse_large_run(first.loop, data.train.shape[2])
        loop = first.loop
        if first.config.per_prompt == "auto":
            loop = dataclasses.replace(loop, per_prompt=limit_per_prompt(loop, data.train))
        with first.named_in_errors():
            make_loop(loop)  # refuses fits and rules that do not go together
        jobs.append(Job(shared, loop, first.config.sizes(), data, scale, hparams))
    return jobs


def _refuse_unscored(config: CompareConfig) -> None:
    """Refuse a table whose column of scores is not named: no model could be judged."""
    if config.target is not None or config.embeddings is None or not os.path.isfile(config.data):
        return
    columns, words = read_columns(config.data, []), f"{config.data} --embeddings {config.embeddings}"
    if are_pairs(columns.names):
        raise JarmError(f"{config.data} holds labelled pairs, and no scores to sweep over: `jarm backtest {words}`.")
    raise JarmError(
        f"{config.data} has no scores to judge models by unless you name their column (`--target`); "
        f"{choice(columns.numeric)}; without scores, `jarm forecast --data {words}` says what choosing may save, "
        "`jarm.select` chooses pairs for people to label, and `jarm backtest` reads pairs that are labelled."
    )


def refuse_large_run(loop: LoopConfig, width: int) -> None:
    """Refuse a run whose arrays of labels, candidates and heads exceed memory for certain; programs say more later."""
    widths, members, candidates = (width, *loop.head.hidden), loop.fit.members, loop.candidates or 0
    weights = sum(a * b for a, b in itertools.pairwise((*widths, 1)))
    # Heads of all rounds, and of the fit with its two moments; both ends of the labelled pairs; the candidates.
    numbers = members * weights * (loop.rounds + 4) + 2 * loop.budget * (width + widths[-1]) + 2 * candidates
    refuse_too_large(
        f"A run of {loop.budget:,} labels, {candidates:,} candidates, {loop.rounds:,} rounds and {members:,} heads of "
        f"{weights:,} weights",
        4 * numbers,
        "take less of what is most",
        free_bytes(),
    )


def calls_of(
    jobs: Sequence[Job], rules: Sequence[str], seeds: int, size: int, done: set[tuple[Any, ...]]
) -> list[Call]:
    """Calls for the missing runs, at most `size` runs each; calls of all rules for the same runs follow each other.

    Args:
      jobs: the jobs.
      rules: the rules.
      seeds: how many seeds.
      size: maximum number of runs per call.
      done: runs that are not missing, as (rule, seed, value of each axis).
    """
    calls = []
    for job in jobs:
        missing = {
            rule: [
                (seed, at) for seed, at in job.runs(seeds) if (rule, seed, *job.settings[at].axes.values()) not in done
            ]
            for rule in rules
        }
        for start in range(0, max(map(len, missing.values())), size):
            calls += [Call(job, rule, some) for rule in rules if (some := missing[rule][start : start + size])]
    return calls
