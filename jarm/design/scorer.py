"""Scorers of pairs, and the best pairs so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jarm.core.types import Array, Float, Int


class Scorer(NamedTuple):
    """How a pass sees pairs.

    Attributes:
      stats: numbers of each response, a pytree of `[N, ...]`.
      pair: `(numbers of one response, numbers of another) -> score`, the same in either order.
      tile: `(numbers [r, ...], numbers [c, ...]) -> [r, c]`: `pair` of each with each, as fast as may be.
      bound: `(numbers [r, ...], numbers [c, ...]) -> scalar` that none of these scores exceeds, found without a number
        for each pair; None: there is none.
      order: `[N]` by which alike responses come together, so that bounds are close; None for the order they are in.
      loud: take NaN for infinity, so that it is found; else it loses every comparison and is passed over.
    """

    stats: Any
    pair: Callable[[Any, Any], Float[Array, ""]]
    tile: Callable[[Any, Any], Float[Array, "r c"]]
    bound: Callable[[Any, Any], Float[Array, ""]] | None = None
    order: Float[Array, "N"] | None = None
    loud: bool = False

    def heard(self, scores: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Scores, or maxima of some, as comparisons are to see them."""
        return jnp.where(jnp.isnan(scores), jnp.inf, scores) if self.loud else scores


class Best(NamedTuple):
    """The best pairs of a space.

    Attributes:
      scores: `[k]` falling; -inf where the space holds fewer.
      pairs: `[k, 2]` smaller index first; N where the score is -inf.
      rest: no pair that was left out scores more, but for rounding; -inf if none was.
      costs: `[k]` what the pairs cost, or None.
    """

    scores: Float[Array, "k"]
    pairs: Int[Array, "k 2"]
    rest: Float[Array, ""]
    costs: Float[Array, "k"] | None = None


def _top(scores: Float[Array, "m"], k: int) -> tuple[Float[Array, "k"], Int[Array, "k"]]:
    """`jax.lax.top_k`, apart from what is done with it."""
    best, chosen = jax.lax.top_k(scores, k)
    # Without the barrier XLA fuses, say, `best[k]` with the top-k, no longer knows it, and sorts all scores. Swapped,
    # since XLA takes a barrier around the very tuple of a top-k for one of its parts, and aborts, on several devices.
    chosen, best = jax.lax.optimization_barrier((chosen, best))
    return best, chosen


def _best(scores: Float[Array, "m"], k: int) -> tuple[Float[Array, "k"], Int[Array, "k"], Float[Array, ""]]:
    """The k largest of some scores, where they stand, and the largest of the others."""
    lacking = max(0, k + 1 - scores.shape[0])
    best, chosen = _top(scores, k + 1 - lacking)
    best = jnp.pad(best, (0, lacking), constant_values=-jnp.inf)
    return best[:k], jnp.pad(chosen, (0, lacking))[:k], best[k]


def _take(stats: Any, index: Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], stats)
