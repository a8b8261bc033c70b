"""Compiled programs: many runs in one call, as many at a time as memory holds."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Compiled

from jarm.core.base import HParams
from jarm.core.memory import host_bytes
from jarm.core.messages import readable
from jarm.core.settings import make_key
from jarm.core.status import JarmError
from jarm.core.streams import say
from jarm.core.types import AnyMesh, Array
from jarm.loop.config import LoopConfig
from jarm.loop.device_table import DeviceTable
from jarm.loop.loop import make_loop
from jarm.loop.simulate import RunRecord
from jarm.loop.steps import LoopState
from jarm.runs.results import Result, failure_of

COMPARED, SWEPT = 16, 64
"""Default number of runs vmapped together on an accelerator, in a comparison and in a sweep; beyond it the slowest run
dominates."""


def default_workers() -> int:
    """Default number of calls at a time: one per core on a CPU, where XLA hardly splits arrays this small; else 1."""
    if jax.default_backend() != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_vmap_runs(max_runs: int = COMPARED) -> int:
    """Default number of runs under `vmap`: 1 on a CPU, where batched runs are slower (`benchmarks/README.md`)."""
    return 1 if jax.default_backend() == "cpu" else max_runs


class Program:
    """The program of a configuration: compiled when first asked for, and shared by all tables of one shape.

    Args:
      config: the loop that is compiled.
      vmap_runs: runs per device and call, under `vmap` if more than one; halved where XLA says that the program does
        not fit, and where memory runs out.
      devices: how many of this process's devices share the runs of a call.
      workers: calls at a time, whose memory adds up.
    """

    def __init__(self, config: LoopConfig, vmap_runs: int = 1, devices: int = 1, workers: int = 1):
        self.config, self.vmap_runs, self.devices, self.workers = config, vmap_runs, devices, workers
        self.mesh = jax.make_mesh((devices,), ("runs",), devices=jax.local_devices()[:devices])
        self.seconds_to_compile = math.nan
        self._compiled: Compiled | None = None
        self._compiling = threading.Lock()

    @property
    def capacity(self) -> int:
        """Number of runs that one call of the program holds."""
        return self.vmap_runs * self.devices

    @property
    def is_compiled(self) -> bool:
        """Whether it has been asked for."""
        return self._compiled is not None

    def __call__(self, rule: str, runs: Sequence[tuple[int, HParams]], table: DeviceTable) -> list[Result]:
        """Run one rule on a table, as many runs at a time as fit.

        Args:
          rule: its name.
          runs: the seed and the numbers of each run.
          table: as `place` returns it.

        Raises:
          JarmError: not even one run at a time fits into the memory of the device.
        """
        results = list[Result]()
        while len(results) < len(runs):
            compiled, capacity = self.compiled(table)
            try:
                results += self._run(compiled, capacity, rule, runs[len(results) : len(results) + capacity], table)
            except jax.errors.JaxRuntimeError as error:
                if not out_of_memory(error):
                    raise
                self.halve(capacity, "memory ran out")
        return results

    def place(self, table: DeviceTable) -> DeviceTable:
        """Copy a table to every device of the program."""
        return jax.device_put(table, NamedSharding(self.mesh, PartitionSpec())) if self.devices > 1 else table

    def compiled(self, table: DeviceTable) -> tuple[Compiled, int]:
        """The program, a function of `(keys, hparams, table, rule)`, and its capacity, the length of the first two.

        Raises:
          JarmError: not even one run at a time fits into the memory of the device.
        """
        with self._compiling:
            while self._compiled is None:
                start = time.perf_counter()
                try:
                    lowered = jit_runs(self.config, self.vmap_runs, self.mesh).lower(*self._arguments(table))
                    compiled = lowered.compile(compiler_options(self.mesh.devices.flat[0]))
                except jax.errors.JaxRuntimeError as error:
                    if not out_of_memory(error):
                        raise
                    self._fewer("memory ran out while it was compiled")
                    continue
                self.seconds_to_compile = time.perf_counter() - start
                needed, room = self.workers * program_bytes(compiled), free_bytes()
                if room is None or needed <= room:
                    self._compiled = compiled
                else:
                    self._fewer(f"{readable(needed)} are needed and {readable(room)} are free")
            return self._compiled, self.capacity

    def halve(self, capacity: int, why: str) -> None:
        """Halve the capacity, unless another thread has halved it already."""
        with self._compiling:
            if capacity == self.capacity:
                self._compiled = None
                self._fewer(why)

    def _fewer(self, why: str) -> None:
        if self.vmap_runs == 1:
            raise JarmError(
                f"Not even one run at a time fits into memory ({why}): take fewer prompts (`--prompts`), a smaller "
                "number of candidates (`--candidates`), a narrower head or fewer members."
            )
        self.vmap_runs //= 2
        say(f"jarm: {why}: {self.vmap_runs} runs at a time instead of {2 * self.vmap_runs}.")

    def _arguments(self, table: DeviceTable) -> tuple[Any, ...]:
        split = NamedSharding(self.mesh, PartitionSpec("runs")) if self.devices > 1 else None
        number = jax.ShapeDtypeStruct((self.capacity,), jnp.float32, sharding=split)
        keys = jax.ShapeDtypeStruct((self.capacity,), make_key(0).dtype, sharding=split)
        hparams = jax.tree.map(lambda _: number, HParams())
        return keys, hparams, table, jax.ShapeDtypeStruct((), jnp.int32)

    def _run(
        self,
        compiled: Compiled,
        capacity: int,
        rule: str,
        runs: Sequence[tuple[int, HParams]],
        table: DeviceTable,
    ) -> list[Result]:
        padded = [*runs, *[runs[-1]] * (capacity - len(runs))]
        keys = jax.vmap(make_key)(jnp.array([seed for seed, _ in padded], jnp.uint32))
        hparams = jax.tree.map(lambda *leaves: np.array(leaves, np.float32), *[hparams for _, hparams in padded])
        if self.devices > 1:
            keys, hparams = jax.device_put((keys, hparams), NamedSharding(self.mesh, PartitionSpec("runs")))
        index = jnp.int32(self.config.rules.index(rule))
        start = time.perf_counter()
        _, records = jax.block_until_ready(compiled(keys, hparams, table, index))
        seconds = (time.perf_counter() - start) / len(runs)
        # Heads leave the device as well: those of many runs and rounds would fill it.
        host, params = jax.tree.map(np.asarray, (records._replace(params=None, noise_free=None), records.params))
        if records.noise_free is not None:
            params = jax.tree.map(_with_last, params, records.noise_free)
        return [
            Result(
                rule=rule,
                seed=seed,
                hparams=hparams,
                records=jax.tree.map(lambda leaf, i=i: leaf[i], host),
                params=jax.tree.map(lambda leaf, i=i: leaf[i], params),
                failure=failure_of(host.status[i]),
                seconds=seconds,
            )
            for i, (seed, hparams) in enumerate(runs)
        ]


def jit_runs(config: LoopConfig, vmap_runs: int, mesh: AnyMesh) -> Any:
    """A jitted function of `(keys, hparams, table, rule)` for `vmap_runs` runs on each device of a mesh."""
    if vmap_runs > 1 and config.fit.batching == "auto":
        # Under vmap the branches that make fits in turn cheap on a CPU would all be taken.
        config = dataclasses.replace(config, fit=dataclasses.replace(config.fit, batching="vmap"))
    run = make_loop(config).run

    def run_all(keys: Array, hparams: HParams, table: DeviceTable, rule: Array) -> tuple[LoopState, RunRecord]:
        if vmap_runs == 1:  # vmap would compute both sides of every branch
            key, hparams = jax.tree.map(lambda leaf: leaf[0], (keys, hparams))
            return jax.tree.map(lambda leaf: leaf[None], run(key, hparams, table, rule))
        return jax.vmap(run, in_axes=(0, 0, None, None))(keys, hparams, table, rule)

    if mesh.size == 1:
        return jax.jit(run_all)
    split, whole = PartitionSpec("runs"), PartitionSpec()
    places = split, split, whole, whole
    spread = jax.shard_map(run_all, mesh=mesh, in_specs=places, out_specs=split, check_vma=False)
    return jax.jit(spread)


def compiler_options(device: jax.Device) -> dict[str, bool]:
    """Options of XLA for programs of hundreds of small kernels, as a run is: it has two ways to write those of a CPU.

    The older one takes half the memory to compile; answers are the same (`benchmarks/README.md`). None where this
    version of XLA has one way only.
    """
    return {"xla_cpu_use_fusion_emitters": False} if device.platform == "cpu" and _two_ways(device) else {}


@functools.cache
def _two_ways(device: jax.Device) -> bool:
    """Whether this version of XLA knows both for a CPU."""
    with jax.default_device(device):
        lowered = jax.jit(lambda: 0).lower()
    try:
        lowered.compile({"xla_cpu_use_fusion_emitters": False})
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _with_last(leaves: np.ndarray, last: Array) -> np.ndarray:
    """`[V, T, ...]` and `[V, ...]` as `[V, T + 1, ...]` on the host."""
    return np.concatenate([leaves, np.asarray(last)[:, None]], axis=1)


def out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether an error of a device says that its memory is full."""
    return "RESOURCE_EXHAUSTED" in str(error)


def program_bytes(program: Compiled) -> int:
    """Memory of a compiled program on each device, in bytes, without its arguments."""
    memory: Any = program.memory_analysis()
    return int(memory.temp_size_in_bytes + memory.output_size_in_bytes)


def free_bytes() -> int | None:
    """Free memory of a device, or on a CPU of the machine, in bytes; None where neither says."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    return host_bytes()
