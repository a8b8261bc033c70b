"""The runner of jobs: their programs, their tables on the device, and calls side by side."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np

from jarm.core.interrupts import STOP, wait_some, was_left
from jarm.core.status import JarmError
from jarm.loop.device_table import DeviceTable
from jarm.runs.jobs import Call, Job
from jarm.runs.programs import COMPARED, SWEPT, Program, default_vmap_runs, default_workers, out_of_memory

T = TypeVar("T")


@runtime_checkable
class RunOptions(Protocol):
    """What the driver reads of the options of a command, a dataclass: which runs, how long, how many at a time."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def rounds(self) -> int:
        """T, batches labelled after the first one."""
        ...

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        ...

    @property
    def workers(self) -> int:
        """Calls at a time; 0 leaves it to the machine."""
        ...

    @property
    def vmap_runs(self) -> int:
        """Runs per call; 0 leaves it to the machine."""
        ...

    def rule_names(self) -> list[str]:
        """Names of the rules, `random` first."""
        ...


def side_by_side(function: Callable[..., T], calls: Sequence[tuple[Any, ...]], workers: int) -> Iterator[T]:
    """Results of the calls as they finish, `workers` of them at a time; an error cancels the calls that have not begun.

    No result waits for a slower one before it, so that an interrupt loses only the calls in flight that take long.

    Raises:
      KeyboardInterrupt: there was a signal to stop; calls that ended in time were yielded.
    """
    waiting, executor = iter(calls), concurrent.futures.ThreadPoolExecutor(workers)

    def begin(count: int) -> set[concurrent.futures.Future[T]]:
        return {executor.submit(function, *call) for call in itertools.islice(waiting, count) if not STOP.is_set()}

    try:
        # Few at a time, so that results are let go of as they are taken.
        pending = begin(2 * workers)
        while pending:
            done = wait_some(pending)
            pending -= done
            for future in done:
                pending |= begin(1)
                if not future.cancelled():
                    yield future.result()
        if STOP.is_set():
            raise KeyboardInterrupt
    finally:
        executor.shutdown(wait=not was_left(), cancel_futures=True)


class Runner:
    """The runner of jobs: jobs share programs and tables where they can.

    Args:
      vmap_runs: maximum number of runs per device and call.
      devices: devices of this process, which share the runs of a call.
      workers: calls at a time; 1 where calls are split over devices.
      placed: whether records have the run's place in the grid.
    """

    def __init__(self, vmap_runs: int, devices: int = 1, workers: int = 1, *, placed: bool = True):
        self.vmap_runs, self.devices, self.workers, self.placed = vmap_runs, devices, workers, placed
        self._programs: dict[Any, Program] = {}
        self._tables: dict[int, DeviceTable] = {}
        self._last: tuple[Any, DeviceTable] | None = None
        self._lock = threading.Lock()

    @property
    def capacity(self) -> int:
        """Maximum number of runs per call."""
        return self.vmap_runs * self.devices

    @property
    def compiled(self) -> int:
        """Number of programs that were compiled."""
        return sum(program.is_compiled for program in self._programs.values())

    def program(self, job: Job) -> Program:
        """The program of a job."""
        with self._lock:
            if job.program not in self._programs:
                self._programs[job.program] = Program(job.loop, self.vmap_runs, self.devices, self.workers)
            return self._programs[job.program]

    def table(self, job: Job) -> DeviceTable:
        """The training table of a job, on the device.

        Raises:
          JarmError: it does not fit into memory.
        """
        program = self.program(job)
        with self._lock:
            if id(job) not in self._tables:
                which = id(job.data.train), job.scale, job.loop.annotator.column, job.loop.annotator.scale
                if self._last is None or self._last[0] != which:
                    self._last = None  # the last table makes room
                    self._last = which, _on_device(job, program)
                self._tables[id(job)] = self._last[1]
            return self._tables[id(job)]

    def forget(self, job: Job) -> None:
        """Let go of a job's table, unless it is the last one, which the next job may share; its program stays."""
        with self._lock:
            self._tables.pop(id(job), None)

    def __call__(self, call: Call) -> list[list[dict[str, Any]]]:
        """Make and evaluate the runs of a call, and return the records of each."""
        job, program = call.job, self.program(call.job)
        results = program(call.rule, [(seed, job.hparams[at]) for seed, at in call.runs], self.table(job))
        found = list[dict[str, np.ndarray]]()
        while len(found) < len(results):
            size = program.capacity
            try:
                found += job.evaluate(results[len(found) : len(found) + size], size)
            except jax.errors.JaxRuntimeError as error:
                if not out_of_memory(error):
                    raise
                program.halve(size, "memory ran out while runs were evaluated")
        places = [job.place(at) if self.placed else {} for _, at in call.runs]
        return [result.lines(*rest) for result, *rest in zip(results, found, places, strict=True)]


def make_runner(jobs: Sequence[Job], base: RunOptions, *, placed: bool = True) -> Runner:
    """The runner of some jobs on all devices of this process; no call is larger than the runs of the largest job.

    Args:
      jobs: the jobs.
      base: for `seeds`, `workers` and `vmap_runs`.
      placed: as for `Runner`; not in a comparison.
    """
    runs, devices = max(len(job.settings) for job in jobs) * base.seeds, jax.local_device_count()
    share = -(-runs // devices)
    calls = -(-share // (base.vmap_runs or default_vmap_runs(SWEPT if placed else COMPARED)))
    workers = 1 if devices > 1 else base.workers or default_workers()
    # Calls of equal size, so that none is filled up with copies.
    return Runner(-(-share // calls), devices, workers, placed=placed)


def _on_device(job: Job, program: Program) -> DeviceTable:
    try:
        return program.place(job.device_table())
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        with job.settings[0].named_in_errors():
            raise JarmError(
                "The training table does not fit into memory: take fewer prompts, or narrower embeddings."
            ) from error
