"""The programs of a sweep: its jobs, checked against their data, the calls that are left, and what runs one."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from jarm.core.base import HParams
from jarm.core.status import JarmError
from jarm.core.tables import TrainTest
from jarm.data.datasets import load
from jarm.loop.device_table import DeviceTable, check_run, make_device_table
from jarm.runs.grid import Group, Setting, SweepConfig, expand, groups
from jarm.runs.programs import Program, default_workers, out_of_memory
from jarm.runs.runner import Runner, judge

T = TypeVar("T")
TOGETHER = 64
"""Runs that an accelerator takes together if memory allows; a larger batch waits for ever slower stragglers."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A group of settings, checked against its data and ready to run.

    Attributes:
      group: its settings, program and data.
      data: the data.
      scale: what gold rewards are divided by.
      hparams: of each setting, as float32.
    """

    group: Group
    data: TrainTest
    scale: float
    hparams: list[HParams]

    @property
    def program(self) -> tuple[Any, ...]:
        """Jobs that have this in common are run by one program."""
        return self.group.loop, self.data.train.shape

    @property
    def judged(self) -> dict[str, Any]:
        """How its runs are evaluated, but for the noise."""
        return {"annotator": self.group.loop.annotator, "scale": self.scale, "best_of": self.group.best_of}


class Call(NamedTuple):
    """One call of one job's program: a rule at some (setting, seed)."""

    job: Job
    rule: str
    cells: list[tuple[Setting, HParams, int]]


def read_jobs(config: SweepConfig) -> list[Job]:
    """All groups of a grid with their data, so that what cannot work is refused before anything runs.

    Raises:
      JarmError: an option, a value, the data or a setting is at fault; which, and what to do.
    """
    for name, least in (("seeds", 1), ("workers", 0), ("vmap_runs", 0)):
        if getattr(config.base, name) < least:
            raise JarmError(f"`{name}` is {getattr(config.base, name)}, which makes no run: give at least {least}.")
    jobs, loaded, solved = [], dict[tuple[Any, ...], TrainTest](), dict[tuple[Any, ...], HParams]()
    for group in groups(expand(config)):
        key = tuple(group.source.values())
        try:
            data = loaded[key] if key in loaded else load(**group.source)
            loaded[key] = data
            if data.train.gold is None or data.test.gold is None:
                raise JarmError("The data has no gold rewards, so there is nothing to judge by: give a `target`.")
            scale, _ = check_run(group.loop, data.train)
        except JarmError as error:
            raise JarmError(f"In the setting {group.settings[0]}: {error}") from error
        hparams = []
        for setting in group.settings:
            try:
                # Solving for a noise takes a while, and needs to be done once for each flip rate.
                loop, which = setting.config.loop(), (key, scale, setting.config.pairs, setting.config.flip_rate)
                numbers = setting.config.hparams()
                if setting.config.flip_rate is not None and which in solved:
                    loop, numbers = group.loop, dataclasses.replace(numbers, noise=solved[which].noise)
                _, numbers = check_run(loop, data.train, numbers)
                solved[which] = numbers
            except JarmError as error:
                raise JarmError(f"In the setting {setting}: {error}") from error
            hparams.append(jax.tree.map(float, numbers))
        jobs.append(Job(group, data, scale, hparams))
    return jobs


class Programs:
    """The runner of each job, made when it is first asked for; jobs with equal programs and shapes share one.

    Args:
      vmap_runs: runs that a device takes together, at most.
      devices: of this process, over which the runs of a call are split.
      workers: calls at work at a time: where calls are split over devices, one.
    """

    def __init__(self, vmap_runs: int, devices: int, workers: int = 1):
        self.vmap_runs, self.devices, self.workers = vmap_runs, devices, workers
        self._programs: dict[Any, Program] = {}
        self._runners: dict[int, Runner] = {}
        self._table: tuple[Any, DeviceTable] | None = None
        self._lock = threading.Lock()

    @property
    def capacity(self) -> int:
        """Most runs of a call."""
        return self.vmap_runs * self.devices

    def __call__(self, job: Job) -> Runner:
        """The runner of a job."""
        with self._lock:
            if id(job) not in self._runners:
                self._runners[id(job)] = self._make(job)
            return self._runners[id(job)]

    def _make(self, job: Job) -> Runner:
        table, which = job.data.train, (id(job.data.train), job.scale)
        program = self._programs.setdefault(
            job.program, Program(job.group.loop, self.vmap_runs, self.devices, self.workers)
        )
        try:
            if self._table is None or self._table[0] != which:
                self._table = None  # the last one makes room
                self._table = which, make_device_table(table, job.scale)
            return Runner(program, self._table[1], timed=False)
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error):
                raise
            raise JarmError(
                f"In the setting {job.group.settings[0]}: the training table does not fit into memory: take fewer "
                "prompts, or narrower embeddings."
            ) from error

    def forget(self, job: Job) -> None:
        """Let go of a job's table, unless it is the last, which the next job may share; its program stays, too."""
        with self._lock:
            self._runners.pop(id(job), None)

    @property
    def compiled(self) -> int:
        """How many programs were compiled."""
        return sum(program.is_compiled for program in self._programs.values())


def make_programs(config: SweepConfig, jobs: list[Job]) -> Programs:
    """The programs of a sweep on all devices of this process, for no more runs together than a job has."""
    cells, devices = max(len(job.group.settings) for job in jobs) * config.base.seeds, jax.local_device_count()
    together = config.base.vmap_runs or (1 if jax.default_backend() == "cpu" else TOGETHER)
    share = -(-cells // devices)
    calls = -(-share // together)  # of equal size, so that none is filled up with copies
    workers = 1 if devices > 1 else config.base.workers or default_workers()
    return Programs(-(-share // calls), devices, workers)


def calls_of(
    jobs: list[Job], rules: list[str], seeds: int, size: int, done: set[tuple[Any, ...]], axes: tuple[str, ...]
) -> list[Call]:
    """What is left to run, at most `size` cells a call; all rules of some cells near each other."""
    calls = []
    for job in jobs:
        of_rule = {
            rule: [
                (setting, hparams, seed)
                for seed in range(seeds)
                for setting, hparams in zip(job.group.settings, job.hparams, strict=True)
                if (rule, seed, *(setting.axes[axis] for axis in axes)) not in done
            ]
            for rule in rules
        }
        for start in range(0, max(map(len, of_rule.values())), size):
            calls += [Call(job, rule, some) for rule in rules if (some := of_rule[rule][start : start + size])]
    return calls


def share_of(calls: list[T], process: int, processes: int, rules: int) -> list[T]:
    """The calls that a process makes: of every rule, which differ in what they take, about as many as the others."""
    return [call for at, call in enumerate(calls) if (at % rules + at // rules) % processes == process]


def run_call(programs: Programs, call: Call) -> list[list[dict[str, Any]]]:
    """The records of each run of a call."""
    job, runner = call.job, programs(call.job)
    results = runner(call.rule, [(seed, hparams) for _, hparams, seed in call.cells])
    head, found = job.group.loop.head.head(), list[dict[str, np.ndarray]]()
    while len(found) < len(results):
        size = runner.program.capacity
        some = results[len(found) : len(found) + size]
        try:
            found += judge(head, some, job.data.test, pad=size, **job.judged)
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error):
                raise
            runner.program.halve(size, "memory ran out while runs were evaluated")
    took = ("seconds_to_fit", "seconds_to_select", "seconds_to_compile")
    lines = []
    for (setting, _, _), result, metrics in zip(call.cells, results, found, strict=True):
        # With its rounds, since an axis may change them under a name of its own.
        place = {**setting.axes, "rounds": job.group.loop.rounds}
        own = [{"kind": line.pop("kind"), **place, **line} for line in result.lines(metrics)]
        lines.append([{name: value for name, value in line.items() if name not in took} for line in own])
    return lines
