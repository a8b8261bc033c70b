"""The k best pairs of a space by a score of each pair alone, and pairs at random: parts of simple rules.

A score is a function of a pair's margin m = r_i - r_j and of a squared distance q = |y_i - y_j|^2 of whitened features.
Every x^T A^-1 x is such a distance: with A = L L^T, y = L^-1 phi.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jarm.core.base import PairSpace, Selection
from jarm.core.linalg import distances, matmul, square_sum
from jarm.core.status import Status, worst
from jarm.core.types import AnyKey, Array, Bool, Float
from jarm.design.fisher import centred
from jarm.design.passes import best_pairs
from jarm.design.scorer import Scorer
from jarm.design.spaces import TILE, sample_pairs, whitens_differences

Score = Callable[[Float[Array, "..."], Float[Array, "..."]], Float[Array, "..."]]
"""`(margin, squared distance) -> score`, elementwise; larger is better."""


def top_pairs(
    score: Score,
    rewards: Float[Array, "N"],
    features: Float[Array, "N F"] | None,
    space: PairSpace,
    k: int,
    *,
    whiten: Float[Array, "G F"] | None = None,
    tile: int = TILE,
) -> Selection:
    """The k pairs of a space with the largest scores, exactly, in O(tile + k) memory.

    Args:
      score: elementwise function of margins and squared distances.
      rewards: `[N]`, for the margins, in logits.
      features: `[N, F]`, or None where the score ignores distances.
      space: which pairs; their costs are ignored.
      k: number of pairs, a Python int.
      whiten: W `[G, F]`: distances are |W (phi_i - phi_j)|^2; None for the identity.
      tile: pairs scored together, which bounds memory.

    Returns:
      The pairs, best first, equal scores in the order of the space; their gains are the scores. Which of the pairs that
      tie with the k-th are among them depends on the shapes alone. Status NONFINITE where features or rewards of an
      eligible response, or scores, are not finite, EXHAUSTED where the space holds fewer than k pairs.

    Example:
      The closest call within two prompts of R = 2 responses:

      >>> import jax.numpy as jnp, jarm
      >>> rewards = jnp.array([0.0, 2.0, 2.5, 3.25])  # [N], in logits
      >>> space = jarm.pair_space("within", 2, jnp.ones(4, bool))
      >>> batch = jarm.top_pairs(lambda margin, distance: -jnp.abs(margin), rewards, None, space, k=1)
      >>> batch.pairs.tolist(), batch.gains.tolist()
      ([[2, 3]], [-0.75])
    """
    rewards, space = jnp.asarray(rewards, jnp.float32), jax.tree.map(jnp.asarray, space)
    finite = jnp.isfinite(rewards)
    y = jnp.zeros((rewards.shape[0], 0), jnp.float32)
    late = features is not None and whitens_differences(space)
    if features is not None:
        features = jnp.asarray(features, jnp.float32)
        finite &= jnp.isfinite(features).all(axis=1)
        y = centred(features, space)
        y = y if whiten is None or late else matmul(y, whiten.T)

    def scored(margin: Array, square: Array) -> Array:
        return jnp.asarray(score(margin, square), jnp.float32)

    def pair(a: tuple[Array, Array], b: tuple[Array, Array]) -> Array:
        x = a[1] - b[1]
        return scored(a[0] - b[0], square_sum(matmul(x, whiten.T) if late and whiten is not None else x))

    def tile_of(rows: tuple[Array, Array], columns: tuple[Array, Array]) -> Array:
        return scored(rows[0][:, None] - columns[0][None, :], jnp.maximum(distances(rows[1], columns[1]), 0))

    best = top_scores(Scorer((rewards, y), pair, tile_of), finite, space, k, tile=tile)
    # A whitener of NaN comes of a singular metric, which has a status of its own: here it is not NONFINITE.
    singular = jnp.isnan(0.0 if whiten is None else whiten).any() & (finite | ~space.eligible).all()
    short = jnp.where(best.valid.all(), jnp.int32(Status.OK), jnp.int32(Status.EXHAUSTED))
    return dataclasses.replace(best, status=jnp.where(singular, short, best.status))


def top_scores(scorer: Scorer, finite: Bool[Array, "N"], space: PairSpace, k: int, *, tile: int = TILE) -> Selection:
    """The k pairs of a space with the largest scores of any kind.

    Args:
      scorer: the score of a pair; see `jarm.design.scorer`.
      finite: `[N]` whether the scorer's numbers of a response are finite.
      space: which pairs; their costs are ignored.
      k: number of pairs, a Python int.
      tile: pairs scored together, which bounds memory.

    Returns:
      As `top_pairs`.
    """
    best = best_pairs(scorer._replace(nan_first=True), dataclasses.replace(space, costs=None), k, tile=tile)
    # Scores may overflow, or be NaN, though all numbers of the responses are finite.
    fine = (finite | ~space.eligible).all() & (best.scores < jnp.inf).all()
    status = jnp.where(fine, jnp.int32(Status.OK), jnp.int32(Status.NONFINITE))
    valid = jnp.isfinite(best.scores)
    short = jnp.where(valid.all(), jnp.int32(Status.OK), jnp.int32(Status.EXHAUSTED))
    return Selection(
        pairs=jnp.where(valid[:, None], best.pairs, 0),
        gains=jnp.where(valid, best.scores, 0),
        valid=valid,
        status=worst(status, short),
    )


def best_first(selection: Selection) -> Selection:
    """The same batch in order of falling gain, for rules whose gains may rise while the batch grows."""
    order = jnp.argsort(jnp.where(selection.valid, -selection.gains, jnp.inf), stable=True)
    weights = None if selection.weights is None else selection.weights[order]
    return dataclasses.replace(selection, pairs=selection.pairs[order], gains=selection.gains[order], weights=weights)


def random_pairs(key: AnyKey, space: PairSpace, k: int) -> Selection:
    """k distinct pairs of a space, uniformly without replacement; gains are 0."""
    pairs, valid = sample_pairs(key, space, k)
    short = jnp.where(valid.all(), jnp.int32(Status.OK), jnp.int32(Status.EXHAUSTED))
    return Selection(pairs=pairs, gains=jnp.zeros(k, jnp.float32), valid=valid, status=short)
