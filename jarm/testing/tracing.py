"""Counts of traces and compilations."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
"""`jax.jit` for programs that run for milliseconds, where compiling takes the time: a third less of it."""


def count_traces(f: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """`f`, and a list that grows by one entry each time Python runs it: under `jax.jit`, each time it is traced."""
    traces: list[int] = []

    @functools.wraps(f)
    def counted(*args: Any, **kwargs: Any) -> Any:
        traces.append(len(traces) + 1)
        return f(*args, **kwargs)

    return counted, traces


@contextlib.contextmanager
def count_compilations() -> Iterator[list[str]]:
    """A list that grows by one entry for each program XLA compiles inside the block, helpers of JAX's own included."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(kwargs.get("fun_name", event)))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
