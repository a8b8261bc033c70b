"""Compiled programs: many runs in one call, as many at a time as memory holds."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import sys
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Compiled

from jarm.core.base import HParams
from jarm.core.messages import readable
from jarm.core.status import JarmError
from jarm.core.types import Array
from jarm.loop.config import LoopConfig
from jarm.loop.device_table import DeviceTable
from jarm.loop.loop import make_loop
from jarm.loop.simulate import RunRecord
from jarm.loop.steps import LoopState


def default_workers() -> int:
    """Runs at a time: on a CPU one a core, since XLA finds little to share out in arrays this small; else 1."""
    if jax.default_backend() != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_vmap_runs() -> int:
    """Seeds of a run under `vmap`: on a CPU 1, where batched runs take longer (`benchmarks/README.md`); else 16."""
    return 1 if jax.default_backend() == "cpu" else 16


class Program:
    """The program of a configuration, compiled when first asked for; several pools of one shape can share it.

    Args:
      config: what is compiled.
      vmap_runs: points that a device runs at a time, under `vmap` if more than one; halved where XLA says that the
        program does not fit, and where memory runs out.
      devices: how many of this process's devices the points of a call are split over.
      workers: calls that will be at work at a time, whose memory adds up.
    """

    def __init__(self, config: LoopConfig, vmap_runs: int = 1, devices: int = 1, workers: int = 1):
        self.config, self.vmap_runs, self.devices, self.workers = config, vmap_runs, devices, workers
        self.mesh = jax.make_mesh((devices,), ("cells",), devices=jax.local_devices()[:devices])
        self.seconds_to_compile = math.nan
        self._compiled: Compiled | None = None
        self._lock = threading.Lock()

    @property
    def capacity(self) -> int:
        """Points of a call that costs no more than one of fewer."""
        return self.vmap_runs * self.devices

    @property
    def is_compiled(self) -> bool:
        """Whether it has been asked for."""
        return self._compiled is not None

    def compiled(self, table: DeviceTable) -> tuple[Compiled, int]:
        """What takes `(keys, hparams, table, rule)`, the first two with an axis of so many points.

        Raises:
          JarmError: not even one point at a time fits into the memory of the device.
        """
        with self._lock:
            while self._compiled is None:
                start = time.perf_counter()
                try:
                    compiled = self._function().lower(*self._arguments(table)).compile()
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
        """Take half as many points as that, unless another thread has seen to it."""
        with self._lock:
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
        print(f"jarm: {why}: {self.vmap_runs} runs at a time instead of {2 * self.vmap_runs}.", file=sys.stderr)

    def _function(self) -> Any:
        config = self.config
        if self.vmap_runs > 1 and config.fit.batching == "auto":
            # Under vmap the branches that make fits in turn cheap on a CPU would all be taken.
            config = dataclasses.replace(config, fit=dataclasses.replace(config.fit, batching="vmap"))
        run, alone = make_loop(config).run, self.vmap_runs == 1

        def together(keys: Array, hparams: HParams, table: DeviceTable, rule: Array) -> tuple[LoopState, RunRecord]:
            if alone:  # without vmap, which would turn every branch into both
                key, hparams = jax.tree.map(lambda leaf: leaf[0], (keys, hparams))
                return jax.tree.map(lambda leaf: leaf[None], run(key, hparams, table, rule))
            return jax.vmap(run, in_axes=(0, 0, None, None))(keys, hparams, table, rule)

        if self.devices == 1:
            return jax.jit(together)
        split, whole = PartitionSpec("cells"), PartitionSpec()
        places = split, split, whole, whole
        return jax.jit(jax.shard_map(together, mesh=self.mesh, in_specs=places, out_specs=split, check_vma=False))

    def _arguments(self, table: DeviceTable) -> tuple[Any, ...]:
        split = NamedSharding(self.mesh, PartitionSpec("cells")) if self.devices > 1 else None
        number = jax.ShapeDtypeStruct((self.capacity,), jnp.float32, sharding=split)
        keys = jax.ShapeDtypeStruct((self.capacity,), jax.random.key(0).dtype, sharding=split)
        hparams = jax.tree.map(lambda _: number, HParams())
        return keys, hparams, table, jax.ShapeDtypeStruct((), jnp.int32)


def out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether that is what an error of a device says."""
    return "RESOURCE_EXHAUSTED" in str(error)


def program_bytes(program: Compiled) -> int:
    """What a compiled program takes on each device beside its arguments."""
    memory: Any = program.memory_analysis()
    return int(memory.temp_size_in_bytes + memory.output_size_in_bytes)


def free_bytes() -> int | None:
    """Memory that a device, or on a CPU the machine, has left; None where neither says."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    except (OSError, StopIteration, ValueError):
        return None
    group = pathlib.Path("/sys/fs/cgroup")
    try:  # where a container or a scheduler allows less
        return min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return free


def keep_compiled() -> None:
    """What goes on, or differs only in numbers, need not compile again."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache" / "jarm" / "compiled"))
