"""One pass over every pair of a space, for the k best: tile by tile, in memory that does not grow with the pairs.

A pass sees a pair through numbers of its two responses, a `Scorer`. Spaces of all pairs are cut into square blocks of
responses; of each block only the maxima of small chunks of pairs are looked at, the chunks with the largest maxima are
kept, and their pairs are scored again one by one. That loses nothing: the k best pairs lie in the k chunks with the
largest maxima, and of as many more chunks as there are excluded pairs, enough are left when those are struck out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jarm.core.base import PairSpace
from jarm.core.types import Array, Bool, Float, Int
from jarm.design.fisher import chunked
from jarm.design.spaces import TILE, contains, get_tile, prompts_of, tile_count, two_blocks

BLOCK = 512
"""Responses on each side of a block: its scores, 1 MiB, stay in a core's own cache."""
SLICES = 16
"""Pairs in a chunk. A slice of a block is a sixteenth of its rows, so that maxima are of whole vectors."""
GROUP = 64
"""Blocks whose chunks compete at once, 4 MiB of maxima: a top-k takes as long for a few numbers as for many."""
_AGAIN = 256
"""Chunks whose pairs are scored again at once."""


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


class _Blocks(NamedTuple):
    """A space of `cross` or `all` pairs in blocks of `side` responses, the last padded.

    Attributes:
      side, number: responses in a block, and blocks.
      stats: numbers of each response, padding included.
      eligible: `[number * side]` bool.
      prompt: `[number * side]` int32.
      response: `[number * side]` int32, which response stands where; N for padding.
    """

    side: int
    number: int
    stats: Any
    eligible: Bool[Array, "n"]
    prompt: Int[Array, "n"]
    response: Int[Array, "n"]

    @property
    def tiles(self) -> int:
        """Pairs of blocks."""
        return self.number * (self.number + 1) // 2

    def blocks_of(self, tile: Int[Array, "*t"]) -> tuple[Int[Array, "*t"], Int[Array, "*t"]]:
        """The two blocks of a tile, the lower first."""
        return two_blocks(tile, self.number)

    def maxima(
        self, scorer: Scorer, tile: Int[Array, ""], floor: Float[Array, ""], *, cross: bool
    ) -> Float[Array, "s c"]:
        """The largest score of each chunk of a tile: one column, and every `side / SLICES`-th row of it.

        Where none can be above the floor, -inf.
        """
        low, high = self.blocks_of(tile)

        def cut(leaf: Array, block: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(leaf, block * self.side, self.side)

        rows, columns = (jax.tree.map(functools.partial(cut, block=block), self.stats) for block in (low, high))

        def compute() -> Float[Array, "s c"]:
            return self._maxima(scorer, rows, columns, low, high, cut, cross)

        wanted = tile < self.tiles
        if scorer.bound is not None:
            wanted &= ~(scorer.bound(rows, columns) <= floor)
        return jax.lax.cond(wanted, compute, lambda: jnp.full((self.side // SLICES, self.side), -jnp.inf))

    def _maxima(
        self,
        scorer: Scorer,
        rows: Any,
        columns: Any,
        low: Int[Array, ""],
        high: Int[Array, ""],
        cut: Callable[[Array, Array], Array],
        cross: bool,
    ) -> Float[Array, "s c"]:
        index = jnp.arange(self.side, dtype=jnp.int32)
        # What is not eligible is above every column and below every row, so one comparison masks it and the triangle.
        row = jnp.where(cut(self.eligible, low), low * self.side + index, jnp.iinfo(jnp.int32).max)
        column = jnp.where(cut(self.eligible, high), high * self.side + index, -1)
        mask = row[:, None] < column[None, :]
        if cross:
            mask &= cut(self.prompt, low)[:, None] != cut(self.prompt, high)[None, :]
        scores = jnp.where(mask, scorer.tile(rows, columns), -jnp.inf)
        slices = scores.reshape(SLICES, -1, self.side)
        # Slice by slice: a maximum over an axis is several times slower than one of arrays.
        return scorer.heard(functools.reduce(jnp.maximum, [slices[i] for i in range(SLICES)]))

    def ends(self, tile: Int[Array, ""], place: Int[Array, ""]) -> tuple[Int[Array, "s"], Int[Array, ""]]:
        """The responses of a chunk: its rows and its column."""
        low, high = self.blocks_of(tile)
        row, column = jnp.divmod(place, self.side)
        step = self.side // SLICES
        return low * self.side + row + step * jnp.arange(SLICES, dtype=jnp.int32), high * self.side + column


def _make_blocks(scorer: Scorer, space: PairSpace) -> _Blocks:
    size = space.eligible.shape[0]
    count = max(1, -(-size // BLOCK))
    side = -(-size // (count * SLICES)) * SLICES
    response = jnp.arange(size, dtype=jnp.int32)
    if scorer.order is not None:
        response = jnp.argsort(jnp.where(space.eligible, scorer.order, jnp.inf)).astype(jnp.int32)
    real = jnp.arange(count * side) < size
    # The last response stands in for padding: bounds of its block stay close.
    response = jnp.pad(response, (0, count * side - size), mode="edge")
    return _Blocks(
        side=side,
        number=count,
        stats=_take(scorer.stats, response),
        eligible=space.eligible[response] & real,
        prompt=prompts_of(space)[response],
        response=jnp.where(real, response, size),
    )


def _best_blocks(
    scorer: Scorer, space: PairSpace, k: int, floor: Float[Array, ""], mesh: jax.sharding.Mesh | None
) -> Best:
    size = space.eligible.shape[0]
    blocks = _make_blocks(scorer, space)
    keep = k + 1 + space.excluded.shape[0]
    cross = space.kind == "cross"
    if mesh is None:
        values, tiles, places = _best_chunks(blocks, scorer, keep, floor, cross=cross)
    else:
        values, tiles, places = _best_chunks_of_mesh(mesh, blocks, scorer, keep, floor, cross=cross)

    def again(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        rows, column = blocks.ends(*chunk)
        numbers = _take(blocks.stats, column)
        scores = jax.vmap(lambda row: scorer.pair(_take(blocks.stats, row), numbers))(rows)
        fine = (chunk[0] >= 0) & blocks.eligible[rows] & blocks.eligible[column] & (rows < column)
        if space.kind == "cross":
            fine &= blocks.prompt[rows] != blocks.prompt[column]
        ends = jnp.stack(jnp.broadcast_arrays(blocks.response[rows], blocks.response[column]), axis=1)
        return jnp.where(fine, scorer.heard(scores), -jnp.inf), jnp.sort(ends, axis=1)

    found = jax.lax.map(again, (tiles, places), batch_size=min(_AGAIN, keep))
    scores, pairs = found[0].reshape(-1), found[1].reshape(-1, 2)
    pairs = jnp.where((scores > -jnp.inf)[:, None], pairs, size)
    scores = jnp.where(contains(space.excluded, pairs), -jnp.inf, scores)
    scores, chosen, rest = _best(scores, k)
    pairs = jnp.where((scores > -jnp.inf)[:, None], pairs[chosen], size)
    # Of equal scores the first of the space stands first.
    falling, first, second = jax.lax.sort((-scores, *pairs.T), num_keys=3)
    return Best(-falling, jnp.stack([first, second], axis=1), jnp.maximum(rest, values[-1]))


def _best_chunks_of_mesh(
    mesh: jax.sharding.Mesh, blocks: _Blocks, scorer: Scorer, keep: int, floor: Float[Array, ""], *, cross: bool
) -> tuple[Float[Array, "c"], Int[Array, "c"], Int[Array, "c"]]:
    """The same, each device looking at every `mesh.size`-th group of tiles; responses are on all of them."""
    nowhere = jax.sharding.PartitionSpec()

    def share(stats: Any, eligible: Array) -> tuple[Array, Array, Array]:
        own = blocks._replace(stats=stats, eligible=eligible)
        start = jax.lax.axis_index(mesh.axis_names)
        found = _best_chunks(own, scorer, keep, floor, cross=cross, start=start, step=mesh.size)
        values, *where = (jax.lax.all_gather(leaf, mesh.axis_names, tiled=True) for leaf in found)
        values, chosen = jax.lax.top_k(values, keep)
        tiles, places = (leaf[chosen] for leaf in where)
        return values, tiles, places

    shared = jax.shard_map(share, mesh=mesh, in_specs=nowhere, out_specs=nowhere, check_vma=False)
    return shared(blocks.stats, blocks.eligible)


def _best_chunks(
    blocks: _Blocks,
    scorer: Scorer,
    keep: int,
    floor: Float[Array, ""],
    *,
    cross: bool,
    start: Int[Array, ""] | int = 0,
    step: int = 1,
) -> tuple[Float[Array, "c"], Int[Array, "c"], Int[Array, "c"]]:
    """The chunks with the largest maxima among every `step`-th group of tiles: maxima, tiles and places in them."""
    # Groups of one size, as many for each device.
    groups = step * -(-blocks.tiles // (step * GROUP))
    together = -(-blocks.tiles // groups)
    chunks = blocks.side * blocks.side // SLICES

    def merge(carry: tuple[Array, Array, Array], group: Array) -> tuple[tuple[Array, Array, Array], None]:
        best, tiles, places = carry
        first = group * together
        numbers = first + jnp.arange(together, dtype=jnp.int32)
        maxima = jax.lax.map(lambda tile: blocks.maxima(scorer, tile, best[-1], cross=cross), numbers).reshape(-1)

        def better(_: None) -> tuple[Array, Array, Array]:
            values, chosen = jax.lax.top_k(jnp.concatenate([best, maxima]), keep)
            old, new = chosen < keep, chosen - keep
            at = jnp.minimum(chosen, keep - 1)
            return (
                values,
                jnp.where(old, tiles[at], first + new // chunks),
                jnp.where(old, places[at], new % chunks),
            )

        return jax.lax.cond((maxima > best[-1]).any(), better, lambda _: carry, None), None

    nothing = (jnp.full(keep, floor), jnp.full(keep, -1, jnp.int32), jnp.zeros(keep, jnp.int32))
    mine = start + step * jnp.arange(groups // step, dtype=jnp.int32)
    return jax.lax.scan(merge, nothing, mine)[0]


def _take(stats: Any, index: Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], stats)
