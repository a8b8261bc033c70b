"""A pass over all pairs of a `cross` or `all` space in blocks, pruned by bounds and shared by the devices of a mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jarm.core.base import PairSpace
from jarm.core.types import AnyMesh, Array, Bool, Float, Int
from jarm.design.scorer import Best, Scorer, gather, top_k_and_rest
from jarm.design.spaces import contains, two_blocks

BLOCK = 512
"""Responses on each side of a tile: its scores, 1 MiB, stay in the cache of one core."""
SLICES = 16
"""Pairs in a chunk. A slice of a tile is a sixteenth of its rows, so that maxima are of whole vectors."""
GROUP = 64
"""Tiles whose chunks compete at once, 4 MiB of maxima: a top-k takes as long for a few numbers as for many."""
TPU_BLOCK, TPU_GROUP = 2048, 4
"""The same for a TPU, with as many pairs at once: a tile there costs as much for being one as for its arithmetic."""
_RESCORED = 256
"""Chunks whose pairs are scored again at once."""


class _Blocks(NamedTuple):
    """Responses in blocks of `side`, the last padded. A tile is a pair of blocks, a chunk `SLICES` pairs of a tile.

    Attributes:
      side: responses in a block.
      number: blocks.
      cross: whether only pairs across prompts count.
      stats: numbers of each response, padding included.
      eligible: `[number * side]` bool.
      prompt: `[number * side]` int32.
      response: `[number * side]` int32, the response at each place; N for padding.
      alike: `[number * side]` int32, equal for responses that are not paired; None where all may be.
    """

    side: int
    number: int
    cross: bool
    stats: Any
    eligible: Bool[Array, "n"]
    prompt: Int[Array, "n"]
    response: Int[Array, "n"]
    alike: Int[Array, "n"] | None

    @property
    def tiles(self) -> int:
        """Pairs of blocks."""
        return self.number * (self.number + 1) // 2

    def cut(self, values: Any, block: Int[Array, ""]) -> Any:
        """Values of the responses of one block, of a pytree of `[number * side, ...]`."""
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, block * self.side, self.side), values)

    def maxima(self, scorer: Scorer, tile: Int[Array, ""], floor: Float[Array, ""]) -> Float[Array, "s c"]:
        """The largest score of each chunk of a tile: one column and every `side / SLICES`-th row of the tile.

        All are -inf where no score can exceed the floor.
        """
        low, high = two_blocks(tile, self.number)
        rows, columns = self.cut(self.stats, low), self.cut(self.stats, high)

        def compute() -> Float[Array, "s c"]:
            index = jnp.arange(self.side, dtype=jnp.int32)
            # Ineligible rows get index +inf and ineligible columns -1, so that `row < column` masks them together with
            # the lower triangle.
            row = jnp.where(self.cut(self.eligible, low), low * self.side + index, jnp.iinfo(jnp.int32).max)
            column = jnp.where(self.cut(self.eligible, high), high * self.side + index, -1)
            mask = row[:, None] < column[None, :]
            if self.cross:
                mask &= self.cut(self.prompt, low)[:, None] != self.cut(self.prompt, high)[None, :]
            if self.alike is not None:
                mask &= self.cut(self.alike, low)[:, None] != self.cut(self.alike, high)[None, :]
            scores = jnp.where(mask, scorer.tile(rows, columns), -jnp.inf)
            slices = scores.reshape(SLICES, -1, self.side)
            # Slice by slice: a maximum over an axis is several times slower than one of arrays.
            return scorer.with_nan_first(functools.reduce(jnp.maximum, [slices[i] for i in range(SLICES)]))

        # Blocks of padding alone are skipped, so that sizes may be rounded up.
        wanted = (tile < self.tiles) & self.cut(self.eligible, low).any() & self.cut(self.eligible, high).any()
        if scorer.bound is not None:
            wanted &= ~(scorer.bound(rows, columns) <= floor)
        return jax.lax.cond(wanted, compute, lambda: jnp.full((self.side // SLICES, self.side), -jnp.inf, jnp.float32))

    def ends(self, tile: Int[Array, ""], place: Int[Array, ""]) -> tuple[Int[Array, "s"], Int[Array, ""]]:
        """Places of the responses of a chunk: its rows and its column."""
        low, high = two_blocks(tile, self.number)
        row, column = jnp.divmod(place, self.side)
        step = self.side // SLICES
        return low * self.side + row + step * jnp.arange(SLICES, dtype=jnp.int32), high * self.side + column


def _make_blocks(scorer: Scorer, space: PairSpace, block: int) -> _Blocks:
    size = space.size
    count = max(1, -(-size // block))
    side = -(-size // (count * SLICES)) * SLICES
    response = jnp.arange(size, dtype=jnp.int32)
    if scorer.order is not None:
        response = jnp.argsort(jnp.where(space.eligible, scorer.order, jnp.inf)).astype(jnp.int32)
    real = jnp.arange(count * side, dtype=jnp.int32) < size
    # Padding repeats the last response, so that the bounds of its block stay tight.
    response = jnp.pad(response, (0, count * side - size), mode="edge")
    eligible, scored = space.eligible[response] & real, response
    if scorer.order is not None:  # the eligible come first, and the last of them stands for others in bounds, too
        last = jnp.maximum(eligible.sum(dtype=jnp.int32) - 1, 0)
        scored = jnp.where(eligible, response, response[last])
    return _Blocks(
        side=side,
        number=count,
        cross=space.kind == "cross",
        stats=gather(scorer.stats, scored),
        eligible=eligible,
        prompt=space.prompt_of[response],
        response=jnp.where(real, response, size),
        alike=None if space.alike is None else space.alike[response],
    )


def best_pairs_in_blocks(
    scorer: Scorer, space: PairSpace, k: int, floor: Float[Array, ""], mesh: AnyMesh | None
) -> Best:
    """`jarm.design.passes.best_pairs` of a `cross` or `all` space, without costs, in tiles of the platform's size."""

    def cut(block: int, group: int) -> Callable[[Float[Array, ""]], Best]:
        return lambda floor: _best_of_blocks(scorer, space, k, floor, mesh, block, group)

    if space.size <= BLOCK:  # one tile anywhere
        return cut(BLOCK, GROUP)(floor)
    return jax.lax.platform_dependent(floor, tpu=cut(TPU_BLOCK, TPU_GROUP), default=cut(BLOCK, GROUP))


def _best_of_blocks(
    scorer: Scorer,
    space: PairSpace,
    k: int,
    floor: Float[Array, ""],
    mesh: AnyMesh | None,
    block: int,
    group: int,
) -> Best:
    """The same in blocks of at most so many responses, so many tiles at once."""
    size = space.size
    blocks = _make_blocks(scorer, space, block)
    keep = k + 1 + space.excluded.shape[0]
    if mesh is None:
        values, tiles, places = _best_chunks(blocks, scorer, keep, floor, group=group)
    else:
        values, tiles, places = _best_chunks_of_mesh(mesh, blocks, scorer, keep, floor, group)

    def rescored(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        rows, column = blocks.ends(*chunk)
        numbers = gather(blocks.stats, column)
        scores = jax.vmap(lambda row: scorer.pair(gather(blocks.stats, row), numbers))(rows)
        valid = (chunk[0] >= 0) & blocks.eligible[rows] & blocks.eligible[column] & (rows < column)
        if blocks.cross:
            valid &= blocks.prompt[rows] != blocks.prompt[column]
        if blocks.alike is not None:
            valid &= blocks.alike[rows] != blocks.alike[column]
        ends = jnp.stack(jnp.broadcast_arrays(blocks.response[rows], blocks.response[column]), axis=1)
        return jnp.where(valid, scorer.with_nan_first(scores), -jnp.inf), jnp.sort(ends, axis=1)

    found = jax.lax.map(rescored, (tiles, places), batch_size=min(_RESCORED, keep))
    scores, pairs = found[0].reshape(-1), found[1].reshape(-1, 2)
    pairs = jnp.where((scores > -jnp.inf)[:, None], pairs, size)
    scores = jnp.where(contains(space.excluded, pairs), -jnp.inf, scores)
    scores, chosen, rest = top_k_and_rest(scores, k)
    pairs = jnp.where((scores > -jnp.inf)[:, None], pairs[chosen], size)
    # Pairs of equal score keep the order of the space.
    falling, first, second = jax.lax.sort((-scores, *pairs.T), num_keys=3)
    return Best(-falling, jnp.stack([first, second], axis=1), jnp.maximum(rest, values[-1]))


_Chunks = tuple[Float[Array, "c"], Int[Array, "c"], Int[Array, "c"]]
"""Some chunks: their maxima, their tiles, and their places in these."""


def _best_chunks_of_mesh(
    mesh: AnyMesh, blocks: _Blocks, scorer: Scorer, keep: int, floor: Float[Array, ""], group: int
) -> _Chunks:
    """`_best_chunks` by all devices of a mesh: each has all responses and takes every `mesh.size`-th group of tiles."""
    nowhere = jax.sharding.PartitionSpec()

    def share(stats: Any, eligible: Array) -> _Chunks:
        own = blocks._replace(stats=stats, eligible=eligible)
        start = jax.lax.axis_index(mesh.axis_names)
        found = _best_chunks(own, scorer, keep, floor, group=group, start=start, step=mesh.size)
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
    group: int,
    start: Int[Array, ""] | int = 0,
    step: int = 1,
) -> _Chunks:
    """The `keep` chunks with the largest maxima among every `step`-th group of tiles; tile -1 where there are fewer."""
    # Groups of one size, and as many for each device.
    groups = step * -(-blocks.tiles // (step * group))
    per_group = -(-blocks.tiles // groups)
    chunks = blocks.side * blocks.side // SLICES

    def merge(carry: _Chunks, number: Array) -> tuple[_Chunks, None]:
        best, tiles, places = carry
        first = number * per_group
        numbers = first + jnp.arange(per_group, dtype=jnp.int32)
        maxima = jax.lax.map(lambda tile: blocks.maxima(scorer, tile, best[-1]), numbers).reshape(-1)

        def better(_: None) -> _Chunks:
            values, chosen = jax.lax.top_k(jnp.concatenate([best, maxima]), keep)
            old, new = chosen < keep, chosen - keep
            at = jnp.minimum(chosen, keep - 1)
            return (
                values,
                jnp.where(old, tiles[at], first + new // chunks),
                jnp.where(old, places[at], new % chunks),
            )

        return jax.lax.cond((maxima > best[-1]).any(), better, lambda _: carry, None), None

    nothing = (jnp.full(keep, floor, jnp.float32), jnp.full(keep, -1, jnp.int32), jnp.zeros(keep, jnp.int32))
    own = start + step * jnp.arange(groups // step, dtype=jnp.int32)
    return jax.lax.scan(merge, nothing, own)[0]
