"""A pass over all pairs of a grid in blocks that bounds prune, shared by the devices of a mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jarm.core.base import PairSpace
from jarm.core.types import Array, Bool, Float, Int
from jarm.design.scorer import Best, Scorer, _best, _take
from jarm.design.spaces import contains, prompts_of, two_blocks

BLOCK = 512
"""Responses on each side of a block: its scores, 1 MiB, stay in a core's own cache."""


SLICES = 16
"""Pairs in a chunk. A slice of a block is a sixteenth of its rows, so that maxima are of whole vectors."""


GROUP = 64
"""Blocks whose chunks compete at once, 4 MiB of maxima: a top-k takes as long for a few numbers as for many."""


_AGAIN = 256
"""Chunks whose pairs are scored again at once."""


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
