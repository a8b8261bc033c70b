"""One pass over every pair of a space, for the k best: tile by tile, in memory that does not grow with the pairs.

A pass sees a pair through numbers of its two responses, a `Scorer`. Spaces of all pairs are cut into square blocks of
responses; of each block only the maxima of small chunks of pairs are looked at, the chunks with the largest maxima are
kept, and their pairs are scored again one by one. That loses nothing: the k best pairs lie in the k chunks with the
largest maxima, and of as many more chunks as there are excluded pairs, enough are left when those are struck out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jarm.core.base import PairSpace
from jarm.core.types import Array, Float, Int
from jarm.design.blocks import _best_blocks
from jarm.design.fisher import chunked
from jarm.design.scorer import Best, Scorer, _best, _take, _top
from jarm.design.spaces import TILE, get_tile, tile_count


def best_pairs(
    scorer: Scorer,
    space: PairSpace,
    k: int,
    *,
    floor: Float[Array, ""] | float = -jnp.inf,
    mesh: jax.sharding.Mesh | None = None,
    tile: int = TILE,
) -> Best:
    """The k pairs of a space with the largest scores, or with the largest scores for what they cost.

    Args:
      scorer: what a pair scores. NaN scores are never found, unless it is `loud`.
      space: which pairs; where they have costs, a score is divided by the cost.
      k: how many, a Python int.
      floor: pairs that score less may be left out, though there is room for them.
      mesh: devices that share the blocks of a space of `cross` or `all` pairs; None for one.
      tile: pairs of a `within` or `listed` space scored together, which bounds memory.

    Returns:
      The pairs, best first, equal scores in the order of the space. Which of pairs that all score the same as the last
      are among them is decided by the shapes alone.
    """
    if space.pairs is not None:
        return _best_listed(scorer, space, k, tile)
    costs = space.costs
    if costs is not None:
        scorer = _per_cost(scorer, costs)
    best = (
        _best_within(scorer, space, k, tile)
        if space.kind == "within"
        else _best_blocks(scorer, space, k, jnp.float32(floor), mesh)
    )
    if costs is None:
        return best
    return best._replace(costs=costs[jnp.minimum(best.pairs, space.eligible.shape[0] - 1)].sum(axis=1))


def _per_cost(scorer: Scorer, costs: Float[Array, "N"]) -> Scorer:
    """The same scores for what a pair costs, where responses have costs."""
    return Scorer(
        (scorer.stats, costs),
        lambda a, b: scorer.pair(a[0], b[0]) / (a[1] + b[1]),
        lambda rows, columns: scorer.tile(rows[0], columns[0]) / (rows[1][:, None] + columns[1][None, :]),
        order=scorer.order,
        loud=scorer.loud,
    )


def _best_listed(scorer: Scorer, space: PairSpace, k: int, tile: int) -> Best:
    """All scores are kept, 4 bytes a pair where the list itself has 8, for a single top-k."""
    assert space.pairs is not None
    size = space.eligible.shape[0]
    numbers = sum(leaf.size for leaf in jax.tree.leaves(scorer.stats)) // size
    # A quarter of a tile, so that the numbers of a chunk stay in a core's own cache.
    chunks = chunked(space.pairs, max(1, tile // (4 * max(1, numbers))), size)

    def scored(pairs: Int[Array, "m 2"]) -> Float[Array, "m"]:
        first, second = jnp.minimum(pairs, size - 1).T
        scores = scorer.heard(jax.vmap(scorer.pair)(_take(scorer.stats, first), _take(scorer.stats, second)))
        fine = (pairs[:, 0] < size) & space.eligible[first] & space.eligible[second]
        return jnp.where(fine, scores, -jnp.inf)

    scores = jax.lax.map(scored, chunks).reshape(-1)
    costs = space.costs
    if costs is not None:
        costs = jnp.pad(costs, (0, scores.shape[0] - costs.shape[0]), constant_values=1)
        scores = scores / costs
    scores, chosen, rest = _best(scores, k)
    pairs = jnp.where((scores > -jnp.inf)[:, None], chunks.reshape(-1, 2)[chosen], size)
    return Best(scores, pairs, rest, None if costs is None else costs[chosen])


def _best_within(scorer: Scorer, space: PairSpace, k: int, tile: int) -> Best:
    def merge(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
        best, pairs = carry
        rows, columns, mask = get_tile(space, index, tile)
        scores = jax.vmap(scorer.tile)(_take(scorer.stats, rows), _take(scorer.stats, columns))
        scores = jnp.where(mask, scorer.heard(scores), -jnp.inf).reshape(-1)
        some, flat = _top(scores, min(k + 1, scores.shape[0]))

        def better(_: None) -> tuple[Array, Array]:
            group, place = jnp.divmod(flat, rows.shape[1] * columns.shape[1])
            first, second = jnp.divmod(place, columns.shape[1])
            found = jnp.stack([rows[group, first], columns[group, second]], axis=1)
            values, order = jax.lax.top_k(jnp.concatenate([best, some]), k + 1)
            return values, jnp.concatenate([pairs, found])[order]

        return jax.lax.cond(some[0] <= best[-1], lambda _: (best, pairs), better, None), None

    start = (jnp.full(k + 1, -jnp.inf, jnp.float32), jnp.full((k + 1, 2), space.eligible.shape[0], jnp.int32))
    best, pairs = jax.lax.scan(merge, start, jnp.arange(tile_count(space, tile), dtype=jnp.int32))[0]
    # Once more, pair by pair: tiles cancel digits.
    size = space.eligible.shape[0]
    first, second = jnp.minimum(pairs, size - 1).T
    again = jax.vmap(scorer.pair)(_take(scorer.stats, first), _take(scorer.stats, second))
    again = jnp.where(jnp.isfinite(best), scorer.heard(again), best)
    scores, chosen, rest = _best(again, k)
    return Best(scores, pairs[chosen], jnp.maximum(rest, best[k]))
