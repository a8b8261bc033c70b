"""Padding at little cost: what works on it is compiled for a few sizes, and the smallest that serves is taken."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jarm.core.types import Array, Int

SIZES = 9
"""Most sizes that a step is compiled for, half a second each: as many as the default protocol has fits."""


@jax.custom_batching.custom_vmap
def _for_all(index: Int[Array, ""]) -> Int[Array, ""]:
    """The largest index of a batch, under vmap: with one for each, all branches would run."""
    return index


@_for_all.def_vmap
def _(axis_size: int, in_batched: list[bool], index: Int[Array, "V"]) -> tuple[Int[Array, ""], bool]:
    return index.max(), False


def smallest(may: bool, f: Callable[..., Any], *needs: tuple[int, Int[Array, ""]]) -> Any:
    """Call f with sizes that hold what is needed of each capacity: it is compiled for a few, and one is branched to.

    Args:
      may: whether to branch at all; else f gets the capacities.
      f: of one size for each of `needs`; what it returns must have the same shapes for all of them.
      needs: capacity, known before it runs, and how much of it is needed, known when it does.
    """
    most = max(capacity for capacity, _ in needs)
    count = min(SIZES, most // 64) if may else 1
    sizes = [tuple(-(-capacity * i // count) for capacity, _ in needs) for i in range(1, count + 1)]
    if len(sizes) < 2:
        return f(*(capacity for capacity, _ in needs))
    enough = jnp.stack([jnp.asarray(size) for size in sizes]) >= jnp.stack([need for _, need in needs])[None, :]
    return jax.lax.switch(_for_all(jnp.argmax(enough.all(axis=1))), [functools.partial(f, *size) for size in sizes])
