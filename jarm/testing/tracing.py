"""Counters of traces and compilations."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
"""`jax.jit` for programs that run for milliseconds: compiles with few optimisations, in two thirds of the time."""


def count_traces(f: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """Count the Python runs of a function: under `jax.jit`, its traces.

    Returns:
      `f`, and a list that grows by one entry per run.

    Example:
      >>> import jax
      >>> from jarm.testing.tracing import count_traces
      >>> counted, traces = count_traces(lambda x: x + 1)
      >>> jitted = jax.jit(counted)
      >>> int(jitted(1)), int(jitted(2)), len(traces)
      (2, 3, 1)
    """
    traces: list[int] = []

    @functools.wraps(f)
    def counted(*args: Any, **kwargs: Any) -> Any:
        traces.append(len(traces) + 1)
        return f(*args, **kwargs)

    return counted, traces


@contextlib.contextmanager
def count_compilations() -> Iterator[list[str]]:
    """A list that grows by one entry per program that XLA compiles inside the block, JAX's own helpers included."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(kwargs.get("fun_name", event)))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
