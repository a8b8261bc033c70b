"""Scorers of pairs, the best pairs of a pass, and a top-k that stays fast when compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jarm.core.types import Array, Float, Int


class Scorer(NamedTuple):
    """A score of pairs, through numbers of their two responses.

    Attributes:
      stats: numbers of each response, a pytree of `[N, ...]`.
      pair: `(numbers of one response, numbers of another) -> score`, symmetric.
      tile: `(numbers [r, ...], numbers [c, ...]) -> [r, c]`: `pair` of each row with each column, fast.
      bound: `(numbers [r, ...], numbers [c, ...]) -> scalar`, an upper bound on these scores, found without a number
        for each pair; None where there is none.
      order: `[N]` key that brings similar responses together, so that bounds are tight; None keeps their order.
      nan_first: treat NaN scores as +inf, so that they are reported instead of ignored.
    """

    stats: Any
    pair: Callable[[Any, Any], Float[Array, ""]]
    tile: Callable[[Any, Any], Float[Array, "r c"]]
    bound: Callable[[Any, Any], Float[Array, ""]] | None = None
    order: Float[Array, "N"] | None = None
    nan_first: bool = False

    def with_nan_first(self, scores: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Scores with NaN as +inf where the scorer is `nan_first`."""
        return jnp.where(jnp.isnan(scores), jnp.inf, scores) if self.nan_first else scores


class Best(NamedTuple):
    """The k best pairs of a space.

    Attributes:
      scores: `[k]` falling; -inf where the space holds fewer pairs.
      pairs: `[k, 2]` smaller index first; N where the score is -inf.
      rest: upper bound, up to rounding, on the score of every other pair; -inf if there is no other.
      costs: `[k]` costs of the pairs, or None.
    """

    scores: Float[Array, "k"]
    pairs: Int[Array, "k 2"]
    rest: Float[Array, ""]
    costs: Float[Array, "k"] | None = None


def gather(stats: Any, index: Int[Array, "*s"]) -> Any:
    """Numbers of some responses: `leaf[index]` of each leaf."""
    return jax.tree.map(lambda leaf: leaf[index], stats)


def top_k(scores: Float[Array, "m"], k: int) -> tuple[Float[Array, "k"], Int[Array, "k"]]:
    """`jax.lax.top_k`, kept apart from the operations that use its result."""
    best, chosen = jax.lax.top_k(scores, k)
    # Without the barrier XLA fuses the top-k with, say, `best[k]`, no longer recognises it, and sorts all scores.
    # Swapped, since on several devices XLA aborts on a barrier around the very tuple of a top-k.
    chosen, best = jax.lax.optimization_barrier((chosen, best))
    return best, chosen


def top_k_and_rest(scores: Float[Array, "m"], k: int) -> tuple[Float[Array, "k"], Int[Array, "k"], Float[Array, ""]]:
    """The k largest scores, padded with -inf; their places; and the largest of the other scores."""
    lacking = max(0, k + 1 - scores.shape[0])
    best, chosen = top_k(scores, k + 1 - lacking)
    best = jnp.pad(best, (0, lacking), constant_values=-jnp.inf)
    return best[:k], jnp.pad(chosen, (0, lacking))[:k], best[k]
