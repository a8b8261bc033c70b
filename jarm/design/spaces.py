"""Pair spaces: which pairs of responses may be asked about, without ever listing them.

`within`, `cross` and `all` spaces are walked in tiles: a tile is `g` groups of `r` rows by `c` columns of responses,
and memory for anything computed over a space is that of one tile. A `listed` space is a plain array of pairs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jarm.core.base import PairSpace
from jarm.core.status import JarmError
from jarm.core.types import Array, Bool, Float, Int, PRNGKey

KINDS = ("within", "cross", "all")
TILE = 1 << 19
"""Pairs in a tile, about: 2 MiB of float32 for each array over a tile."""


class Tile(NamedTuple):
    """Some pairs of a space: responses `rows[g, r]` against `columns[g, c]`, where `mask[g, r, c]`.

    Over all tiles of a space each of its pairs is unmasked exactly once, with its smaller index as the row.
    """

    rows: Int[Array, "g r"]
    columns: Int[Array, "g c"]
    mask: Bool[Array, "g r c"]


def pair_space(
    kind: str,
    width: int,
    eligible: Bool[Array, "N"],
    excluded: Int[Array, "L 2"] | None = None,
) -> PairSpace:
    """A space of `within`, `cross` or `all` pairs of the eligible responses.

    Args:
      kind: `within` one prompt, `cross` prompts, or `all`.
      width: R, responses a prompt, padding included; response n belongs to prompt n // R.
      eligible: `[N]` responses that may be in a pair.
      excluded: `[L, 2]` pairs never to be offered, in any order; rows with an index of N or more are padding.

    Returns:
      The space.

    Raises:
      JarmError: unknown kind, or N is not a multiple of R.
    """
    if kind not in KINDS:
        raise JarmError(f"There is no pair space {kind!r}: choose from {', '.join(KINDS)}.")
    eligible = jnp.asarray(eligible, bool)
    size = eligible.shape[0]
    if width < 1 or size % width:
        raise JarmError(f"{size} responses do not form whole prompts of {width}: pad `eligible` with false.")
    space = PairSpace(kind=kind, width=width, eligible=eligible, excluded=jnp.zeros((0, 2), jnp.int32))
    return space if excluded is None else exclude(space, excluded)


def listed_space(
    pairs: Int[Array, "M 2"],
    eligible: Bool[Array, "N"],
    width: int = 1,
    costs: Float[Array, "M"] | None = None,
) -> PairSpace:
    """A space of the given pairs. Mirrors, repeats, self-pairs and ineligible ends are dropped (made padding).

    Args:
      pairs: `[M, 2]` response indices in any order; a row with an index outside the N is padding.
      eligible: `[N]` responses that may be in a pair.
      width: R, responses a prompt; with 1 every response is a prompt by itself, to rules that look at prompts.
      costs: `[M]` what each pair costs, or None; of a pair that is repeated the least counts.

    Returns:
      The space, its pairs in lexicographic order with padding last.
    """
    size = eligible.shape[0]
    ends = jnp.clip(pairs, 0, size - 1)
    good = eligible[ends].all(axis=1) & (pairs[:, 0] != pairs[:, 1])
    good &= ((pairs >= 0) & (pairs < size)).all(axis=1)
    costs = None if costs is None else jnp.asarray(costs, jnp.float32)
    pairs, costs = _distinct(jnp.where(good[:, None], pairs, size), size, costs)
    return PairSpace(
        kind="listed",
        width=width,
        eligible=eligible,
        excluded=jnp.zeros((0, 2), jnp.int32),
        pairs=pairs,
        costs=costs,
    )


def exclude(space: PairSpace, pairs: Int[Array, "L 2"]) -> PairSpace:
    """The space without some pairs (`[L, 2]`, any order; an index of N or more is padding)."""
    size = space.eligible.shape[0]
    if space.pairs is not None:
        gone = contains(_distinct(pairs, size)[0], space.pairs)
        return _replace(space, pairs=jnp.where(gone[:, None], size, space.pairs))
    return _replace(space, excluded=_distinct(jnp.concatenate([space.excluded, pairs]), size)[0])


def _replace(space: PairSpace, **changes: object) -> PairSpace:
    return PairSpace(**(vars(space) | changes))


def _distinct(
    pairs: Int[Array, "L 2"], size: int, costs: Float[Array, "L"] | None = None
) -> tuple[Int[Array, "L 2"], Float[Array, "L"] | None]:
    """Each pair once, smaller index first, in lexicographic order; the rest is padding `(size, size)`, last."""
    low, high = pairs.min(axis=1), pairs.max(axis=1)
    hole = (high >= size) | (low == high)
    paid = [] if costs is None else [costs]
    low, high, *paid = jax.lax.sort(
        (jnp.where(hole, size, low), jnp.where(hole, size, high), *paid), num_keys=2 + len(paid)
    )
    repeated = (low[1:] == low[:-1]) & (high[1:] == high[:-1])
    repeated = jnp.concatenate([jnp.zeros(1, bool), repeated])[: low.shape[0]]
    # A second sort moves the holes that repeats leave to the end.
    low, high, *paid = jax.lax.sort(
        (jnp.where(repeated, size, low), jnp.where(repeated, size, high), *paid), num_keys=2
    )
    return jnp.stack([low, high], axis=1), paid[0] if paid else None


def contains(sorted_pairs: Int[Array, "L 2"], pairs: Int[Array, "M 2"]) -> Bool[Array, "M"]:
    """Which of `pairs` (smaller index first) are among `sorted_pairs` (lexicographic)."""
    return find(sorted_pairs, pairs)[1]


def find(sorted_pairs: Int[Array, "L 2"], pairs: Int[Array, "M 2"]) -> tuple[Int[Array, "M"], Bool[Array, "M"]]:
    """Where each of `pairs` (smaller index first) is in `sorted_pairs` (lexicographic), and whether: binary search."""
    count = sorted_pairs.shape[0]
    if count == 0:
        return jnp.zeros(pairs.shape[0], jnp.int32), jnp.zeros(pairs.shape[0], bool)
    first, second = pairs[:, 0], pairs[:, 1]
    position = jnp.zeros(pairs.shape[0], jnp.int32)
    for step in (1 << bit for bit in reversed(range(count.bit_length()))):
        probe = sorted_pairs[jnp.minimum(position + step - 1, count - 1)]
        before = (probe[:, 0] < first) | ((probe[:, 0] == first) & (probe[:, 1] < second))
        position += step * (before & (position + step <= count)).astype(jnp.int32)
    position = jnp.minimum(position, count - 1)
    found = sorted_pairs[position]
    return position, (found[:, 0] == first) & (found[:, 1] == second)


def most_pairs(space: PairSpace) -> int:
    """A number of pairs that the space cannot exceed, known before it runs."""
    if space.pairs is not None:
        return int(space.pairs.shape[0])
    size, width = space.eligible.shape[0], space.width
    return size * (width - 1) // 2 if space.kind == "within" else size * (size - 1) // 2


def whitens_differences(space: PairSpace) -> bool:
    """Whether a linear map costs less for the differences of pairs than for responses: a list of fewer pairs."""
    return space.pairs is not None and space.pairs.shape[0] < space.eligible.shape[0]


def is_in(space: PairSpace, pairs: Int[Array, "m 2"]) -> Bool[Array, "m"]:
    """Which pairs (smaller index first) the space holds."""
    size = space.eligible.shape[0]
    ends = jnp.clip(pairs, 0, size - 1)
    good = ((pairs >= 0) & (pairs < size)).all(axis=1) & (pairs[:, 0] < pairs[:, 1]) & space.eligible[ends].all(axis=1)
    if space.pairs is not None:
        # Lists need not be in order, so it is the pairs asked about that are sorted, and those of the list looked up.
        asked, _ = _distinct(pairs, size)
        place, found = find(asked, space.pairs)
        listed = jnp.zeros(len(asked), bool).at[jnp.where(found, place, len(asked))].set(True, mode="drop")
        return good & listed[find(asked, pairs)[0]]
    home = prompts_of(space)[ends]
    same = home[:, 0] == home[:, 1]
    inside = {"within": same, "cross": ~same, "all": jnp.ones_like(same)}[space.kind]
    return good & inside & ~contains(space.excluded, pairs)


def alive_pairs(space: PairSpace) -> Bool[Array, "M"]:
    """Which rows of a list are pairs of the space."""
    assert space.pairs is not None
    size = space.eligible.shape[0]
    return (space.pairs < size).all(axis=1) & space.eligible[jnp.minimum(space.pairs, size - 1)].all(axis=1)


def prompts_of(space: PairSpace) -> Int[Array, "N"]:
    """The prompt of each response."""
    if space.prompt is not None:
        return space.prompt
    return jnp.arange(space.eligible.shape[0], dtype=jnp.int32) // space.width


def tile_count(space: PairSpace, tile: int = TILE) -> int:
    """How many tiles `get_tile` divides the space into (a Python int)."""
    side = _side(space, tile)
    if space.kind == "within":
        return -(-(space.eligible.shape[0] // space.width) // side)
    blocks = -(-space.eligible.shape[0] // side)
    return blocks * (blocks + 1) // 2


def _side(space: PairSpace, tile: int) -> int:
    """Prompts (within) or responses on each side (otherwise) of a tile, spread evenly over the tiles."""
    size, width = space.eligible.shape[0], space.width
    units, most = (size // width, tile // (width * width)) if space.kind == "within" else (size, math.isqrt(tile))
    count = -(-units // max(1, most))
    return -(-units // count)


def two_blocks(index: Int[Array, "*t"], blocks: int) -> tuple[Int[Array, "*t"], Int[Array, "*t"]]:
    """The pair of blocks with a number from 0 to blocks (blocks + 1) / 2 - 1, the lower first: by diagonals."""

    def start(diagonal: Int[Array, "*t"]) -> Int[Array, "*t"]:
        return diagonal * blocks - diagonal * (diagonal - 1) // 2

    whole = 2 * blocks + 1
    root = jnp.sqrt((whole * whole - 8.0 * index.astype(jnp.float32)).clip(0))
    diagonal = ((whole - root) / 2).astype(jnp.int32)
    # The root is rounded: one step to either side mends it.
    diagonal -= start(diagonal) > index
    diagonal += start(diagonal + 1) <= index
    low = jnp.clip(index - start(diagonal), 0, blocks - 1)
    return low, jnp.clip(low + diagonal, 0, blocks - 1)


def get_tile(space: PairSpace, index: Int[Array, ""] | int, tile: int = TILE) -> Tile:
    """Tile number `index` of a `within`, `cross` or `all` space; shapes do not depend on `index`."""
    size, width = space.eligible.shape[0], space.width
    side = _side(space, tile)
    index = jnp.asarray(index, jnp.int32)
    low, high = space.excluded[:, 0], space.excluded[:, 1]
    if space.kind == "within":
        start = index * side
        prompts = start + jnp.arange(side, dtype=jnp.int32)
        rows = columns = prompts[:, None] * width + jnp.arange(width, dtype=jnp.int32)[None, :]
        struck = (
            low // width - start,
            low % width,
            jnp.where(low // width == high // width, high % width, width),
        )
    else:
        start_row, start_column = (block * side for block in two_blocks(index, -(-size // side)))
        rows, columns = (start + jnp.arange(side, dtype=jnp.int32)[None, :] for start in (start_row, start_column))
        struck = (jnp.zeros_like(low), low - start_row, high - start_column)
    alive_rows = (rows < size) & space.eligible[jnp.minimum(rows, size - 1)]
    alive_columns = (columns < size) & space.eligible[jnp.minimum(columns, size - 1)]
    mask = alive_rows[:, :, None] & alive_columns[:, None, :] & (rows[:, :, None] < columns[:, None, :])
    if space.kind == "cross":
        home = prompts_of(space)
        mask &= home[jnp.minimum(rows, size - 1)][:, :, None] != home[columns][:, None, :]
    # Negative indices would count from the end: send them out of bounds, where the scatter drops them.
    outside = jnp.iinfo(jnp.int32).max
    mask = mask.at[tuple(jnp.where(axis < 0, outside, axis) for axis in struck)].set(False, mode="drop")
    return Tile(jnp.minimum(rows, size - 1), jnp.minimum(columns, size - 1), mask)


def pair_count(space: PairSpace) -> Float[Array, ""]:
    """How many pairs the space holds, as float32: exact below 2^24, rounded above."""
    if space.pairs is not None:
        return alive_pairs(space).sum(dtype=jnp.float32)
    size, width = space.eligible.shape[0], space.width
    if space.prompt is None:
        by_prompt = space.eligible.reshape(-1, width).sum(axis=1, dtype=jnp.float32)
    else:
        by_prompt = jax.ops.segment_sum(space.eligible.astype(jnp.float32), space.prompt, size)
    within = (by_prompt * (by_prompt - 1) / 2).sum()
    # A sum, not a difference of rounded totals: `sample_pairs` would look for ever for a pair that is not there.
    cross = (by_prompt * (jnp.cumsum(by_prompt) - by_prompt)).sum()
    held = {"within": within, "cross": cross, "all": within + cross}[space.kind]
    ends = jnp.minimum(space.excluded, size - 1)
    inside = (space.excluded[:, 0] < size) & space.eligible[ends].all(axis=1)
    home = prompts_of(space)[ends]
    same = home[:, 0] == home[:, 1]
    inside &= {"within": same, "cross": ~same, "all": jnp.ones_like(same)}[space.kind]
    return held - inside.sum(dtype=jnp.float32)


def sample_pairs(key: PRNGKey, space: PairSpace, k: int) -> tuple[Int[Array, "k 2"], Bool[Array, "k"]]:
    """k distinct pairs of the space, uniformly without replacement, without listing it.

    A listed space is shuffled. Otherwise pairs of responses are drawn and those outside the space, or drawn before,
    are thrown away until k are found or the space is empty: O(k) memory whatever the size of the space.

    Returns:
      Pairs `[k, 2]`, smaller index first, and `[k]` whether each exists: false where the space held fewer than k.
    """
    size = space.eligible.shape[0]
    if space.pairs is not None:
        ticket = jax.random.uniform(key, space.pairs.shape[:1])
        ticket = jnp.where(space.pairs[:, 0] < size, ticket, -1.0)
        best, chosen = jax.lax.top_k(ticket, min(k, ticket.shape[0]))
        pairs = jnp.where((best >= 0)[:, None], space.pairs[chosen], 0)
        lacking = k - best.shape[0]
        return jnp.pad(pairs, ((0, lacking), (0, 0))), jnp.pad(best >= 0, (0, lacking))

    order = jnp.argsort(~space.eligible, stable=True).astype(jnp.int32)
    alive = jnp.maximum(space.eligible.sum(dtype=jnp.int32), 1)
    wanted = jnp.minimum(pair_count(space), k).astype(jnp.int32)
    draws = 2 * k + 64

    def draw(carry: tuple[PRNGKey, Array, Array]) -> tuple[PRNGKey, Array, Array]:
        key, found, _ = carry
        key, key_first, key_second, key_some = jax.random.split(key, 4)
        first = order[jax.random.randint(key_first, (draws,), 0, alive)]
        if space.kind == "within":
            second = first // space.width * space.width
            second += jax.random.randint(key_second, (draws,), 0, space.width)
        else:
            second = order[jax.random.randint(key_second, (draws,), 0, alive)]
        low, high = jnp.minimum(first, second), jnp.maximum(first, second)
        good = (low != high) & space.eligible[low] & space.eligible[high]
        if space.kind == "cross":
            home = prompts_of(space)
            good &= home[low] != home[high]
        good &= ~contains(space.excluded, jnp.stack([low, high], axis=1))
        drawn = jnp.where(good[:, None], jnp.stack([low, high], axis=1), size)
        found = _some_distinct(key_some, jnp.concatenate([found, drawn]), size, k)
        return key, found, (found[:, 0] < size).sum(dtype=jnp.int32)

    empty = jnp.full((k, 2), size, jnp.int32)
    _, found, count = jax.lax.while_loop(lambda carry: carry[2] < wanted, draw, (key, empty, jnp.int32(0)))
    valid = jnp.arange(k, dtype=jnp.int32) < count
    return jnp.where(valid[:, None], found, 0), valid


def _some_distinct(key: PRNGKey, pairs: Int[Array, "n 2"], size: int, k: int) -> Int[Array, "k 2"]:
    """k of the distinct pairs in random order, all of them where there are fewer; padding (index `size`) last."""
    if size < 1 << 16:  # a pair is one number, which sorts ten times faster than two
        low, high = pairs.astype(jnp.uint32).T
        number = jnp.sort(low * (size + 1) + high)
        pairs = jnp.stack(jnp.divmod(number, size + 1), axis=1).astype(jnp.int32)
    else:
        pairs = jnp.stack(jax.lax.sort((pairs[:, 0], pairs[:, 1]), num_keys=2), axis=1)
    repeated = jnp.pad((pairs[1:] == pairs[:-1]).all(axis=1), (1, 0))
    ticket = jnp.where(repeated | (pairs[:, 0] >= size), -1.0, jax.random.uniform(key, pairs.shape[:1]))
    best, chosen = jax.lax.top_k(ticket, k)
    return jnp.where((best >= 0)[:, None], pairs[chosen], size)


def subset(key: PRNGKey, space: PairSpace, count: int) -> PairSpace:
    """A listed space of `count` pairs drawn uniformly without replacement (fewer where the space holds fewer)."""
    size = space.eligible.shape[0]
    pairs, valid = sample_pairs(key, space, count)
    return PairSpace(
        kind="listed",
        width=space.width,
        eligible=space.eligible,
        excluded=jnp.zeros((0, 2), jnp.int32),
        pairs=jnp.where(valid[:, None], pairs, size),
        prompt=space.prompt,
    )


def compact(space: PairSpace) -> tuple[Int[Array, "n"], PairSpace]:
    """A listed space of M pairs on the responses that are in one, at most 2 M.

    Returns:
      `[2 M]` the responses, in rising order and then padded with 0; and the space in their indices, which knows their
      prompts (numbered anew) and whose padding is not eligible.
    """
    assert space.pairs is not None
    size, room = space.eligible.shape[0], 2 * space.pairs.shape[0]
    present = jnp.zeros(size, bool).at[space.pairs].set(True, mode="drop")
    place = jnp.cumsum(present, dtype=jnp.int32) - 1
    index = jnp.arange(size, dtype=jnp.int32)
    responses = jnp.zeros(room, jnp.int32).at[jnp.where(present, place, room)].set(index, mode="drop")
    home = prompts_of(space)
    # Prompts of fewer responses than there were: as numbers below `room`.
    used = jnp.zeros(size, bool).at[jnp.where(present, home, size)].set(True, mode="drop")
    prompt = (jnp.cumsum(used, dtype=jnp.int32) - 1)[home]
    local = PairSpace(
        kind="listed",
        width=1,
        eligible=jnp.arange(room, dtype=jnp.int32) < present.sum(),
        excluded=jnp.zeros((0, 2), jnp.int32),
        pairs=jnp.where(space.pairs < size, place[jnp.minimum(space.pairs, size - 1)], room),
        prompt=jnp.zeros(room, jnp.int32).at[jnp.where(present, place, room)].set(prompt, mode="drop"),
    )
    return responses, local
