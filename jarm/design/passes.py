"""One pass over every pair of a space, for the k best: tile by tile, in memory that does not grow with the pairs.

A pass sees a pair through numbers of its two responses, a `Scorer`. A space of all pairs is cut into square tiles of
blocks of responses. The pass keeps the maximum of each small chunk of pairs, then the chunks with the largest maxima,
and scores their pairs again one by one. No pair is lost: the k best lie in the k chunks with the largest maxima, and
one chunk more for each excluded pair leaves enough when the excluded pairs are removed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jarm.core.base import PairSpace
from jarm.core.types import AnyMesh, Array, Float, Int
from jarm.design.blocks import best_pairs_in_blocks
from jarm.design.fisher import chunked
from jarm.design.scorer import Best, Scorer, gather, top_k, top_k_and_rest
from jarm.design.spaces import TILE, Tile, get_tile, tile_count


def best_pairs(
    scorer: Scorer,
    space: PairSpace,
    k: int,
    *,
    floor: Float[Array, ""] | float = -jnp.inf,
    mesh: AnyMesh | None = None,
    tile: int = TILE,
) -> Best:
    """The k pairs of a space with the largest scores, or the largest scores per cost where the space has costs.

    Args:
      scorer: the score of a pair. NaN scores are ignored, unless it is `nan_first`.
      space: the pairs.
      k: how many, a Python int.
      floor: pairs of lower score may be left out, even if there is room for them.
      mesh: devices that share the tiles of a space of `cross` or `all` pairs; None for one device.
      tile: pairs of a `within` or `listed` space scored together, which bounds memory.

    Returns:
      The pairs, best first, equal scores in the order of the space. Shapes alone decide which of the pairs that tie
      with the last are among them.

    Example:
      The two largest distances among 5 responses on a line.

      >>> import jax.numpy as jnp
      >>> from jarm.design.spaces import pair_space
      >>> y = jnp.array([0.0, 1.0, 2.0, 4.0, 9.0])
      >>> scorer = Scorer(y, lambda a, b: abs(a - b), lambda rows, columns: abs(rows[:, None] - columns[None, :]))
      >>> best = best_pairs(scorer, pair_space("all", 1, jnp.ones(5, bool)), 2)
      >>> best.pairs.tolist(), best.scores.tolist(), float(best.rest)
      ([[0, 4], [1, 4]], [9.0, 8.0], 7.0)
    """
    if space.pairs is not None:
        return _best_listed(scorer, space, k, tile)
    costs = space.costs
    if costs is not None:
        scorer = _per_cost(scorer, costs)
    best = (
        _best_within(scorer, space, k, tile)
        if space.kind == "within"
        else best_pairs_in_blocks(scorer, space, k, jnp.float32(floor), mesh)
    )
    if costs is None:
        return best
    return best._replace(costs=costs[jnp.minimum(best.pairs, space.size - 1)].sum(axis=1))


def _per_cost(scorer: Scorer, costs: Float[Array, "N"]) -> Scorer:
    """Scores per cost of a pair, where a pair costs the sum of its responses; no bound."""
    return Scorer(
        (scorer.stats, costs),
        lambda a, b: scorer.pair(a[0], b[0]) / (a[1] + b[1]),
        lambda rows, columns: scorer.tile(rows[0], columns[0]) / (rows[1][:, None] + columns[1][None, :]),
        order=scorer.order,
        nan_first=scorer.nan_first,
    )


def _scores_of(scorer: Scorer, pairs: Int[Array, "m 2"], size: int) -> Float[Array, "m"]:
    """Scores one by one, of any pair where an index is N."""
    first, second = jnp.minimum(pairs, size - 1).T
    return scorer.with_nan_first(jax.vmap(scorer.pair)(gather(scorer.stats, first), gather(scorer.stats, second)))


def _best_listed(scorer: Scorer, space: PairSpace, k: int, tile: int) -> Best:
    """The best of a list. All scores are kept, 4 bytes per pair where the list itself has 8, for a single top-k."""
    assert space.pairs is not None
    size = space.size
    numbers = sum(leaf.size for leaf in jax.tree.leaves(scorer.stats)) // size
    # A quarter of a tile, so that the numbers of a chunk stay in the cache of one core.
    chunks = chunked(space.pairs, max(1, tile // (4 * max(1, numbers))), size)

    def scored(pairs: Int[Array, "m 2"]) -> Float[Array, "m"]:
        first, second = jnp.minimum(pairs, size - 1).T
        valid = (pairs[:, 0] < size) & space.eligible[first] & space.eligible[second]
        nothing = jnp.full(len(pairs), -jnp.inf, jnp.float32)
        # Chunks of padding alone are skipped, so that lengths may be rounded up.
        scores = jax.lax.cond(valid.any(), lambda: _scores_of(scorer, pairs, size), lambda: nothing)
        return jnp.where(valid, scores, -jnp.inf)

    scores = jax.lax.map(scored, chunks).reshape(-1)
    costs = space.costs
    if costs is not None:
        costs = jnp.pad(costs, (0, scores.shape[0] - costs.shape[0]), constant_values=1)
        scores = scores / costs
    scores, chosen, rest = top_k_and_rest(scores, k)
    pairs = jnp.where((scores > -jnp.inf)[:, None], chunks.reshape(-1, 2)[chosen], size)
    return Best(scores, pairs, rest, None if costs is None else costs[chosen])


def _best_within(scorer: Scorer, space: PairSpace, k: int, tile: int) -> Best:
    """The best of a `within` space, tile by tile, and one more for `rest`."""

    def merge(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
        # Tiles of padding alone are skipped, so that the number of prompts may be rounded up.
        tile_of = get_tile(space, index, tile)
        return jax.lax.cond(tile_of.mask.any(), better_of, lambda carry, _: carry, carry, tile_of), None

    def better_of(carry: tuple[Array, Array], tile_of: Tile) -> tuple[Array, Array]:
        best, pairs = carry
        rows, columns, mask = tile_of
        scores = jax.vmap(scorer.tile)(gather(scorer.stats, rows), gather(scorer.stats, columns))
        scores = jnp.where(mask, scorer.with_nan_first(scores), -jnp.inf).reshape(-1)
        values, places = top_k(scores, min(k + 1, scores.shape[0]))

        def better(_: None) -> tuple[Array, Array]:
            group, place = jnp.divmod(places, rows.shape[1] * columns.shape[1])
            first, second = jnp.divmod(place, columns.shape[1])
            found = jnp.stack([rows[group, first], columns[group, second]], axis=1)
            merged, order = jax.lax.top_k(jnp.concatenate([best, values]), k + 1)
            return merged, jnp.concatenate([pairs, found])[order]

        return jax.lax.cond(values[0] <= best[-1], lambda _: (best, pairs), better, None)

    start = (jnp.full(k + 1, -jnp.inf, jnp.float32), jnp.full((k + 1, 2), space.size, jnp.int32))
    best, pairs = jax.lax.scan(merge, start, jnp.arange(tile_count(space, tile), dtype=jnp.int32))[0]
    # Scored again pair by pair, because the products of a tile cancel digits.
    exact = jnp.where(jnp.isfinite(best), _scores_of(scorer, pairs, space.size), best)
    scores, chosen, rest = top_k_and_rest(exact, k)
    return Best(scores, pairs[chosen], jnp.maximum(rest, best[k]))
