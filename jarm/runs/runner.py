"""Runs of one configuration on the host: compiled once, several at a time where that pays, each with what it took."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Compiled

from jarm.core.base import HParams, RewardHead
from jarm.core.files import plain
from jarm.core.status import JarmError, check
from jarm.core.tables import ResponseTable
from jarm.core.types import Array, Params
from jarm.evaluation.metrics import evaluate
from jarm.loop.device_table import DeviceTable
from jarm.loop.loop import make_loop
from jarm.loop.simulate import RunRecord
from jarm.loop.steps import LoopState
from jarm.runs.programs import Program, out_of_memory

T = TypeVar("T")


def side_by_side(function: Callable[..., T], calls: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[T]:
    """Results of the calls as they finish, `jobs` of them at work at a time; an error cancels what has not begun.

    None waits for a slower one before it, so that an interrupt loses only what is in flight.
    """
    waiting = iter(calls)
    with concurrent.futures.ThreadPoolExecutor(jobs) as executor:
        try:
            # Few at a time, so that results are let go of as they are taken.
            pending = {executor.submit(function, *call) for call in itertools.islice(waiting, 2 * jobs)}
            while pending:
                done, pending = concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    pending |= {executor.submit(function, *call) for call in itertools.islice(waiting, 1)}
                    yield future.result()
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


Point: TypeAlias = tuple[int, HParams]
"""What a program takes as data: a seed, and the traced numbers."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
      rule, seed, hparams: which.
      records: on the host, with a leading axis over rounds; without the heads.
      params: the heads of every round.
      failure: the sentence of the worst status, or None.
      seconds: wall time of the run, other runs at its side; of one of several under `vmap`, an equal share.
      seconds_to_fit, seconds_to_select: median of single calls on the last state of the rule's first run, with nothing
        beside them; NaN of a runner that is not `timed`.
      seconds_to_compile: of the program that all runs share.
    """

    rule: str
    seed: int
    hparams: HParams
    records: RunRecord
    params: Params
    failure: str | None
    seconds: float
    seconds_to_fit: float
    seconds_to_select: float
    seconds_to_compile: float

    def lines(self, metrics: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        """Flat records, one a round; batch_* describe the batch labelled just before. One line if it failed.

        Args:
          metrics: name -> `[T + 1]`.
        """
        if self.failure:
            return [{"kind": "failed", "rule": self.rule, "seed": self.seed, "message": self.failure}]
        run = self.records
        took = ("seconds_to_fit", "seconds_to_select", "seconds_to_compile", "seconds")
        lines = []
        for t in range(len(run.labels)):
            batch = {f"batch_{name}": values[t - 1] if t else math.nan for name, values in run.batch.items()}
            line = {
                "kind": "run",
                "rule": self.rule,
                "seed": self.seed,
                "round": t,
                "labels": run.labels[t],
                "label_error": run.wrong[t] / run.labels[t],
                **{name: values[t] for name, values in metrics.items()},
                **batch,
                "fit_train_nll": run.fit.train_nll[t].mean(),
                "fit_valid_nll": run.fit.valid_nll[t].mean(),
                "fit_steps": run.fit.steps[t].mean(),
                **{name: getattr(self, name) for name in took},
            }
            lines.append({name: plain(value) for name, value in line.items()})
        return lines


class Runner:
    """Runs of one configuration on one table.

    Args:
      program: what runs them.
      table: the training table, on the device.
      timed: whether a rule's first call also times a fit and a selection, two small programs more.
    """

    def __init__(self, program: Program, table: DeviceTable, *, timed: bool = True):
        self.program, self.rules = program, program.config.rules
        split = program.devices > 1
        self.table = jax.device_put(table, NamedSharding(program.mesh, PartitionSpec())) if split else table
        loop = make_loop(program.config)
        self._fit, self._select = jax.jit(loop.fit), jax.jit(loop.select)
        self._timed, self._took = timed, dict[str, tuple[float, float]]()
        self._lock = threading.Lock()  # of what only the first of several threads should do

    def __call__(self, rule: str, points: Sequence[Point]) -> list[Result]:
        """Run one rule at some points, as many at a time as fit.

        Raises:
          JarmError: not even one point at a time fits into the memory of the device.
        """
        start, results = 0, list[Result]()
        while start < len(points):
            compiled, capacity = self.program.compiled(self.table)
            some = points[start : start + capacity]
            try:
                results += self._run(compiled, capacity, rule, some)
                start += len(some)
            except jax.errors.JaxRuntimeError as error:
                if not out_of_memory(error):
                    raise
                self.program.halve(capacity, "memory ran out")
        return results

    def _run(self, compiled: Compiled, capacity: int, rule: str, points: Sequence[Point]) -> list[Result]:
        padded = [*points, *[points[-1]] * (capacity - len(points))]
        keys = jax.vmap(jax.random.key)(np.array([seed for seed, _ in padded], np.uint32))
        hparams = jax.tree.map(lambda *leaves: np.array(leaves, np.float32), *[hparams for _, hparams in padded])
        if self.program.devices > 1:
            split = NamedSharding(self.program.mesh, PartitionSpec("cells"))
            keys, hparams = jax.device_put((keys, hparams), split)
        index = jnp.int32(self.rules.index(rule))
        start = time.perf_counter()
        state, records = jax.block_until_ready(compiled(keys, hparams, self.table, index))
        seconds = (time.perf_counter() - start) / len(points)
        with self._lock:
            if self._timed and rule not in self._took:
                self._took[rule] = self._time(points[0][1], jax.tree.map(lambda leaf: leaf[0], state), index)
        return list(self._results(rule, points, records, seconds))

    def _results(self, rule: str, points: Sequence[Point], records: RunRecord, seconds: float) -> Iterator[Result]:
        # Heads leave the device as well: those of many runs and rounds would fill it.
        host, params = jax.tree.map(np.asarray, (records._replace(params=None), records.params))
        took = self._took.get(rule, (math.nan, math.nan))
        for i, (seed, hparams) in enumerate(points):
            yield Result(
                rule=rule,
                seed=seed,
                hparams=hparams,
                records=jax.tree.map(lambda leaf, i=i: leaf[i], host),
                params=jax.tree.map(lambda leaf, i=i: leaf[i], params),
                failure=_failure(host.status[i]),
                seconds=seconds,
                seconds_to_fit=took[0],
                seconds_to_select=took[1],
                seconds_to_compile=self.program.seconds_to_compile,
            )

    def _time(self, hparams: HParams, state: LoopState, index: Array) -> tuple[float, float]:
        return (
            _seconds(lambda: self._fit(hparams, state, self.table)),
            _seconds(lambda: self._select(hparams, state, self.table, index)),
        )


def judge(
    head: RewardHead, results: Sequence[Result], table: ResponseTable, *, pad: int = 1, **judged: Any
) -> list[dict[str, np.ndarray]]:
    """`evaluate` of the heads of several runs in one walk through the test table, each with the noise of its labels.

    Args:
      head, table: as for `evaluate`.
      results: runs of one program.
      pad: a multiple that the number of runs is brought to, so that few shapes compile.
      judged: the other arguments of `evaluate`.
    """
    rounds = len(results[0].records.labels)
    padded = [*results, *[results[-1]] * (-len(results) % pad)]
    params = jax.tree.map(lambda *leaves: jnp.asarray(np.concatenate(leaves)), *[result.params for result in padded])
    noise = np.repeat([np.float32(result.hparams.noise) for result in padded], rounds)
    found = evaluate(head, params, table, noise=noise, **judged)
    return [
        {name: values[i * rounds : (i + 1) * rounds] for name, values in found.items()} for i in range(len(results))
    ]


def _failure(status: np.ndarray) -> str | None:
    try:
        check(status)
    except JarmError as error:
        return str(error)
    return None


def _seconds(call: Callable[[], Any]) -> float:
    """Median wall time of three calls, after one that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return sorted(times)[1]
