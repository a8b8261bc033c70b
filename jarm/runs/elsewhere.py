"""Calls made elsewhere: by the workers of any executor, processes of this or other machines that come, go and die.

A call travels as a small description. A worker reads its tables where they lie, once, and keeps them and its compiled
programs; where it cannot, Dask brings them. What it made comes back as records, which the caller alone writes.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from jarm.acquisition.registry import RULES, source_of
from jarm.core.compiled import keep_compiled
from jarm.core.interrupts import STOP, wait_some
from jarm.core.messages import brief
from jarm.core.status import JarmError
from jarm.core.tables import TrainTest
from jarm.data.datasets import load
from jarm.runs.jobs import Call, Job, Made
from jarm.runs.programs import SWEPT, default_vmap_runs
from jarm.runs.records import provenance
from jarm.runs.results import failed_line
from jarm.runs.runner import Runner

LOST = 3
"""Number of workers that a call may cost: it is given out again twice."""
AT_ONCE = 1024
"""Calls that are given out at a time, so that any number of workers has something to do."""
ANSWER_SECONDS = 10
"""Time that a scheduler has to answer."""


class Task(NamedTuple):
    """The description of a call, without its data.

    Attributes:
      sweep: the key of what a worker keeps for the calls of a sweep.
      size: maximum number of runs per call.
      vmap_runs: runs under `vmap` per device; 0 leaves it to the worker.
      job: fields of the job but `data`; of its settings only those of the runs.
      rule, runs: as in `Call`.
      file: hash of the rule's file, if it has one.
      source: arguments of `load`.
      tables: provenance of the training and the test table.
    """

    sweep: str
    size: int
    vmap_runs: int
    job: Mapping[str, Any]
    rule: str
    runs: tuple[tuple[int, int], ...]
    file: str | None
    source: Mapping[str, Any]
    tables: tuple[Mapping[str, Any], Mapping[str, Any]]


def make_elsewhere(
    executor: concurrent.futures.Executor, calls: Iterable[Call], sweep: str, *, size: int, vmap_runs: int = 0
) -> Iterator[Made]:
    """Make calls by the workers of an executor, and yield them as they come back.

    A call whose worker died is given out again, twice at most; then its runs have failed.

    Args:
      executor: the executor; it is not shut down.
      calls: the calls.
      sweep: the key of what a worker keeps for them.
      size: maximum number of runs per call.
      vmap_runs: as in `Task`.

    Raises:
      JarmError: the executor takes no calls any more, its workers do not reach the data, or one says what is at fault.
      KeyboardInterrupt: there was a signal to stop.
    """
    waiting, lost = iter(calls), collections.Counter[int]()
    pending, scattered = dict[concurrent.futures.Future[Any], tuple[Call, Any]](), dict[int, Any]()

    def send(call: Call) -> None:
        task = describe(call, sweep, size=size, vmap_runs=vmap_runs)
        try:
            tables = scattered.get(id(call.job.data))
            pending[executor.submit(make_task, task, tables)] = call, tables
        except Exception as error:  # each engine has its own
            pending.clear()
            raise JarmError(
                f"The executor takes no more calls ({brief(error)}): start its workers again, and the same sweep; the "
                "runs that came back are kept."
            ) from error

    try:
        for call in itertools.islice(waiting, AT_ONCE):
            send(call)
        while pending:
            for future in wait_some(set(pending)):
                call, tables = pending.pop(future)
                data = id(call.job.data)
                if future.cancelled() and STOP.is_set():
                    continue
                if died := _workers_lost(future):
                    lost[id(call)] += died
                    if tables is not None and tables is scattered.get(data):
                        del scattered[data]  # they may have gone with the worker
                    if lost[id(call)] < LOST:
                        send(call)
                        continue
                    yield _failed(call, lost[id(call)], future)
                elif (made := _result(future)) is None:
                    if data not in scattered:
                        scattered[data] = _scatter(executor, call.job.data)
                    send(call)
                    continue
                else:
                    runs, by = made
                    yield Made(call, [[{**line, "rule": call.rule} for line in lines] for lines in runs], by)
                if not STOP.is_set():
                    for call in itertools.islice(waiting, 1):
                        send(call)
        if STOP.is_set():
            raise KeyboardInterrupt
    finally:
        for future in pending:
            future.cancel()


def describe(call: Call, sweep: str, *, size: int, vmap_runs: int = 0) -> Task:
    """The description of a call; paths of its data and rules are whole, since workers have folders of their own."""
    job, places = call.job, sorted({at for _, at in call.runs})
    own = {field.name: getattr(job, field.name) for field in dataclasses.fields(job) if field.name != "data"}
    source = dict(job.settings[0].source)
    return Task(
        sweep=sweep,
        size=size,
        vmap_runs=vmap_runs,
        job=own
        | {
            "settings": [job.settings[at] for at in places],
            "hparams": [job.hparams[at] for at in places],
            "loop": dataclasses.replace(job.loop, rules=tuple(_whole_rule(str(rule)) for rule in job.loop.rules)),
        },
        rule=_whole_rule(call.rule),
        runs=tuple((seed, places.index(at)) for seed, at in call.runs),
        file=source_of(call.rule),
        source=source | {name: _whole(source[name]) for name in ("data", "embeddings") if source[name]},
        tables=(dict(job.data.train.provenance), dict(job.data.test.provenance)),
    )


def make_task(task: Task, tables: TrainTest | None = None) -> tuple[list[list[dict[str, Any]]], dict[str, Any]] | None:
    """Make the runs of a described call in this process.

    Args:
      task: the description.
      tables: the tables, where this process could not read them before.

    Returns:
      The records of each run and the provenance of this process; None where the tables cannot be read here.

    Raises:
      JarmError: the file of the rule is missing or another one, or a run does not fit into memory.
    """
    keep_compiled()
    if source_of(task.rule) != task.file:
        raise JarmError(f"{task.rule.rpartition(':')[0]} of a worker is another file: give all the same.")
    with _LOCK:
        kept = _kept(task.sweep, task.size, task.vmap_runs)
        key = repr((task.source, task.tables))
        if key not in kept.tables:
            if (found := tables or _read(task)) is None:
                return None
            kept.tables[key] = found
    job = Job(**task.job, data=kept.tables[key])
    try:
        return kept.runner(Call(job, task.rule, task.runs)), kept.by
    finally:
        kept.runner.forget(job)


class _Kept(NamedTuple):
    """What a worker keeps for the calls of a sweep. Tables stay as long as their runner, which knows them by `id`."""

    runner: Runner
    tables: dict[str, TrainTest]
    by: dict[str, Any]


_LOCK = threading.Lock()


@functools.lru_cache(maxsize=2)
def _kept(sweep: str, size: int, vmap_runs: int) -> _Kept:
    devices = min(size, jax.local_device_count())
    share = min(-(-size // devices), vmap_runs or default_vmap_runs(SWEPT))
    return _Kept(Runner(share, devices), {}, provenance())


def _read(task: Task) -> TrainTest | None:
    """The tables as this process reads them; None where it cannot, or where they are others."""
    try:
        found = load(**task.source)
    except (JarmError, OSError):
        return None
    return found if tuple(dict(table.provenance) for table in found) == task.tables else None


def _scatter(executor: concurrent.futures.Executor, tables: TrainTest) -> Any:
    """The tables in the workers of Dask, which pass them on to those that join; without the way back to their files."""
    client = getattr(executor, "_client", None)
    if client is None:
        raise JarmError(
            "A worker cannot read the data, or reads others, under the path that they have here: put them on a disk "
            "that all workers see."
        )
    return client.scatter(TrainTest(*(dataclasses.replace(each, origin=None) for each in tables)), broadcast=True)


def _whole(path: str) -> str:
    return os.path.abspath(path) if os.path.exists(path) and path.partition(":")[0] != "synthetic" else path


def _whole_rule(rule: str) -> str:
    path, _, function = rule.rpartition(":")
    return rule if rule in RULES else f"{os.path.abspath(path)}:{function}"


def _workers_lost(future: concurrent.futures.Future[Any]) -> int:
    """How many workers died of a call, or before it was done."""
    error = concurrent.futures.CancelledError() if future.cancelled() else future.exception()
    if isinstance(error, (concurrent.futures.BrokenExecutor, concurrent.futures.CancelledError)):
        return 1
    # A scheduler of Dask gives calls out again by itself: its KilledWorker says how often.
    return getattr(error, "allowed_failures", -1) + 1


def _result(future: concurrent.futures.Future[Any]) -> Any:
    try:
        return future.result()
    except ImportError as error:
        raise JarmError(f"A worker lacks a package ({brief(error)}): install jarm on all machines.") from error


def _failed(call: Call, lost: int, future: concurrent.futures.Future[Any]) -> Made:
    """A call that was given up."""
    error = None if future.cancelled() else future.exception()
    cause = "the call was cancelled" if error is None else brief(error)
    message = f"{lost} workers died while they made this run: {cause}"
    return Made(call, [[failed_line(call.job.place(at), call.rule, seed, message)] for seed, at in call.runs], None)


@contextlib.contextmanager
def dask_executor(address: str) -> Iterator[concurrent.futures.Executor]:
    """The workers of a Dask scheduler, as an executor.

    Raises:
      JarmError: the extra `cluster` is not installed, or no scheduler answers at the address.
    """
    try:
        import distributed
    except ImportError as error:
        raise JarmError("A Dask cluster needs the package `distributed`: install `jarm-jax[cluster]`.") from error
    try:
        client = distributed.Client(address, timeout=ANSWER_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise JarmError(
            f"No Dask scheduler answers at {address!r} within {ANSWER_SECONDS} s ({brief(error)}): start `dask "
            "scheduler`, and give its HOST:PORT."
        ) from error
    with client:
        yield client.get_executor(pure=False, retries=0)
