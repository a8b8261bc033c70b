"""Runs of one configuration on the host: compiled once, several at a time where that pays, each with what it took."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jarm.base import HParams, JarmError, check
from jarm.loop import LoopConfig, LoopState, RunRecord, make_loop
from jarm.pool import Pool
from jarm.records import plain
from jarm.types import Params

T = TypeVar("T")


def default_jobs() -> int:
    """Runs at a time: on a CPU one a core, since XLA finds little to share out in arrays this small; else 1."""
    if jax.default_backend() != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_together() -> int:
    """Seeds of a run under `vmap`: on a CPU 1, where batched runs take longer (`benchmarks/README.md`); else 16."""
    return 1 if jax.default_backend() == "cpu" else 16


def side_by_side(function: Callable[..., T], calls: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[T]:
    """Results of the calls as they finish, `jobs` of them at work at a time; an error cancels what has not begun.

    None waits for a slower one before it, so that an interrupt loses only what is in flight.
    """
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(function, *call) for call in calls]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
      rule, seed: which.
      records: on the host, with a leading axis over rounds; without the heads.
      params: the heads of every round.
      failure: the sentence of the worst status, or None.
      seconds: wall time of the run, other runs at its side; of one of several under `vmap`, an equal share.
      seconds_to_fit, seconds_to_select: median of single calls on the last state of the rule's first run, with nothing
        beside them.
      seconds_to_compile: of the program that all runs share.
    """

    rule: str
    seed: int
    records: RunRecord
    params: Params
    failure: str | None
    seconds: float
    seconds_to_fit: float
    seconds_to_select: float
    seconds_to_compile: float

    def lines(self, metrics: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        """Flat records, one a round; batch_* describe the batch that was bought just before. One line if it failed.

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
    """Runs of one configuration: one program for all its rules, compiled at the first call.

    Args:
      config: what is compiled.
      hparams: the traced numbers, unless a call gives others.
      pool: the training table.
      together: seeds of one call, under `vmap` if more than one.
    """

    def __init__(self, config: LoopConfig, hparams: HParams, pool: Pool, together: int = 1):
        if together > 1 and config.fit.batching == "auto":
            # Under vmap the branches that make fits in turn cheap on a CPU would all be taken.
            config = dataclasses.replace(config, fit=dataclasses.replace(config.fit, batching="vmap"))
        loop = make_loop(config)
        self.rules, self.hparams, self.pool, self.together = config.rules, hparams, pool, together
        self._run = jax.jit(loop.run if together == 1 else jax.vmap(loop.run, in_axes=(0, None, None, None)))
        self._fit, self._select = jax.jit(loop.fit), jax.jit(loop.select)
        self._compiled: Any = None
        self._to_compile = math.nan
        self._took: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()  # of what only the first of several threads should do

    def __call__(self, rule: str, *seeds: int, hparams: HParams | None = None) -> list[Result]:
        """Run one rule with at most `together` seeds; a rule's first call also times a fit and a selection."""
        hparams, index = hparams or self.hparams, jnp.int32(self.rules.index(rule))
        padded = [*seeds, *[seeds[-1]] * (self.together - len(seeds))]
        keys = jnp.stack([jax.random.key(seed) for seed in padded])
        arguments = (keys[0] if self.together == 1 else keys, hparams, self.pool, index)
        with self._lock:
            if self._compiled is None:
                start = time.perf_counter()
                self._compiled = self._run.lower(*arguments).compile()
                self._to_compile = time.perf_counter() - start
        start = time.perf_counter()
        state, records = jax.block_until_ready(self._compiled(*arguments))
        seconds = (time.perf_counter() - start) / len(seeds)
        if self.together == 1:
            state, records = jax.tree.map(lambda leaf: leaf[None], (state, records))
        with self._lock:
            if rule not in self._took:
                self._took[rule] = self._time(hparams, jax.tree.map(lambda leaf: leaf[0], state), index)
        return list(self._results(rule, seeds, records, seconds))

    def _results(self, rule: str, seeds: tuple[int, ...], records: RunRecord, seconds: float) -> Iterator[Result]:
        host = jax.tree.map(np.asarray, records._replace(params=None))
        for i, seed in enumerate(seeds):
            yield Result(
                rule=rule,
                seed=seed,
                records=jax.tree.map(lambda leaf, i=i: leaf[i], host),
                params=jax.tree.map(lambda leaf, i=i: leaf[i], records.params),
                failure=_failure(host.status[i]),
                seconds=seconds,
                seconds_to_fit=self._took[rule][0],
                seconds_to_select=self._took[rule][1],
                seconds_to_compile=self._to_compile,
            )

    def _time(self, hparams: HParams, state: LoopState, index: jax.Array) -> tuple[float, float]:
        return (
            _seconds(lambda: self._fit(hparams, state, self.pool)),
            _seconds(lambda: self._select(hparams, state, self.pool, index)),
        )


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
