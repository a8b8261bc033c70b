"""From a caller's arrays to a pair space and back: prompts of any names and sizes, lists, costs, excluded pairs.

All arrays here are NumPy's, and all indices the caller's, except for the grid of a `within` space. Lists and excluded
pairs differ in length from call to call, so `listed_space`, `exclude` and `contains` of `jarm.design.spaces` would be
compiled anew in each; their counterparts here run on the host.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from jarm.core.base import PairSpace, Selection
from jarm.core.buckets import bucket, padded
from jarm.core.ids import Id, code_ids, read_ids
from jarm.core.messages import choose
from jarm.core.rows import count_alike
from jarm.core.status import JarmError
from jarm.design.spaces import KINDS

PADDING = 4
"""Prompts of unequal size are padded to a grid of at most this many times their responses, and listed pair by pair
beyond: a listed pair takes some 27 times as long as a place of a grid."""
FINE = 1 << 14
"""Responses or pairs beyond which their number is rounded up by a quarter at most: passes skip most of the padding, but
memory does not."""


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The pairs on offer, as the passes see them.

    Attributes:
      space: the pair space, nothing excluded, with NumPy leaves.
      rows: `[n]` the caller's response at each place of the space, -1 for padding; None where the two are the same.
      total: number of pairs in the space.
      copies: number of pairs left out of it, because their responses have equal features.
      excluded: `[E, 2]` int64 distinct pairs of the space that are not offered, in the caller's indices.
      costs: `[N]` float64 of the caller's responses, or None; costs of listed pairs are in the space.
      prompts: `[N]` codes of the prompts, or None.
      alike: `[N]` the same number for responses with equal features, or None.
    """

    space: PairSpace
    rows: np.ndarray | None
    total: int
    copies: int
    excluded: np.ndarray
    costs: np.ndarray | None = None
    prompts: np.ndarray | None = None
    alike: np.ndarray | None = None

    @property
    def count(self) -> int:
        """Number of pairs on offer."""
        return self.total - len(self.excluded)

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Values of the caller's responses `[N, ...]` at the places of the space, 0 for padding."""
        if self.rows is None:
            return values
        values = values[np.maximum(self.rows, 0)]
        values[self.rows < 0] = 0
        return values

    def without(self, pairs: np.ndarray, capacity: int) -> PairSpace:
        """The space without some of `excluded`, at most `capacity` unless it is a list, which has room for all."""
        size = len(self.space.eligible)
        if self.space.pairs is not None:
            listed = np.asarray(self.space.pairs)
            dropped = is_among(listed, pairs)
            return _changed(self.space, pairs=np.where(dropped[:, None], np.int32(size), listed))
        places = self.places(pairs)
        order = places[np.lexsort(places.T[::-1])].astype(np.int32)
        return _changed(self.space, excluded=padded(order, capacity, size))

    def places(self, pairs: np.ndarray) -> np.ndarray:
        """The places in the space of pairs of the caller's responses, smaller place first, `[m, 2]` int64."""
        if self.rows is None:
            return pairs
        place = np.zeros(self.rows.max() + 1, np.int64)
        place[self.rows[self.rows >= 0]] = np.flatnonzero(self.rows >= 0)
        return np.sort(place[pairs], axis=1)

    @functools.cached_property
    def written_out(self) -> np.ndarray:
        """Every pair of the space in the indices of the caller, excluded or not, in lexicographic order: `[M, 2]`."""
        space = self.space
        if space.pairs is not None:
            listed = np.asarray(space.pairs, np.int64)
            return listed[listed[:, 0] < space.size]
        if space.kind == "within":
            assert self.prompts is not None
            pairs = _pairs_within(self.prompts)
            pairs = pairs[np.argsort(_keys(pairs))]
        else:
            pairs = np.stack(np.triu_indices(int(np.asarray(space.eligible).sum()), 1), axis=1)
        if space.kind == "cross":
            assert self.prompts is not None
            pairs = pairs[self.prompts[pairs[:, 0]] != self.prompts[pairs[:, 1]]]
        return pairs if self.alike is None else pairs[self.alike[pairs[:, 0]] != self.alike[pairs[:, 1]]]

    def chosen(self, selection: Selection) -> np.ndarray:
        """The pairs of a batch in the caller's indices, smaller index first, `[m, 2]` int64."""
        pairs = np.asarray(selection.pairs, np.int64)[np.asarray(selection.valid)]
        return np.sort(pairs if self.rows is None else self.rows[pairs], axis=1)

    def costs_of(self, pairs: np.ndarray) -> np.ndarray | None:
        """Costs of pairs of the space `[m]`, float64, or None."""
        if self.space.costs is None:
            return None
        if self.space.pairs is None:
            assert self.costs is not None
            return self.costs[pairs].sum(axis=1)
        place = np.searchsorted(_keys(np.asarray(self.space.pairs)), _keys(pairs))
        return np.asarray(self.space.costs)[place].astype(np.float64)


def is_among(pairs: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which pairs `[m, 2]` are among others, all with their smaller index first."""
    return np.isin(_keys(pairs), _keys(others))


def find_candidates(
    space: str | np.ndarray,
    size: int,
    prompts: np.ndarray | None,
    costs: np.ndarray | None,
    excluded: np.ndarray,
    alike: np.ndarray | None = None,
) -> Candidates:
    """The pairs on offer.

    Args:
      space: `within`, `cross`, `all`, or `[M, 2]` pairs.
      size: N, number of responses.
      prompts: `[N]` codes from 0, or None.
      costs: `[N]` of responses, or `[M]` of listed pairs, also where M = N; a pair listed twice has its lower cost.
      excluded: `[E, 2]` pairs in any order.
      alike: `[N]` the same number for responses with equal features, which are not paired; None where all differ.

    Returns:
      The candidates.

    Raises:
      JarmError: there is no such space, or it needs prompts.
    """
    if isinstance(space, str):
        choose("pair space", space, KINDS, "or give pairs [M, 2]")
        if space != "all" and prompts is None:
            raise JarmError(f"Pairs {space!r} prompts need to know them: give prompts=, the prompt of each response.")
    excluded = np.unique(np.sort(excluded, axis=1), axis=0)
    if alike is not None:
        excluded = excluded[alike[excluded[:, 0]] != alike[excluded[:, 1]]]
    if not isinstance(space, str):
        if costs is not None and len(costs) != len(space):
            costs = costs[space].sum(axis=1)
        return _listed(space, size, prompts, costs, excluded, alike)
    counts = np.array([size]) if prompts is None else np.bincount(prompts)
    within, every = int((counts * (counts - 1) // 2).sum()), size * (size - 1) // 2
    copies = _count_copies(space, prompts, alike)
    if space != "all":
        assert prompts is not None
        same = prompts[excluded[:, 0]] == prompts[excluded[:, 1]]
        excluded = excluded[same if space == "within" else ~same]
    if space == "within":
        assert prompts is not None
        if counts.max() * (counts > 1).sum() > PADDING * size:
            pairs = _pairs_within(prompts)
            return _listed(pairs, size, prompts, None if costs is None else costs[pairs].sum(axis=1), excluded, alike)
        rows, width, total = _grid(prompts, counts), _width(counts), within
    else:
        rows, width, total = padded(np.arange(size), _room(size), -1), 1, every - (within if space == "cross" else 0)
    prompt = None if prompts is None or space == "within" else prompts.astype(np.int32)
    made = Candidates(
        _space(
            kind=space,
            width=width,
            eligible=rows >= 0,
            prompt=None if prompt is None else prompt[np.maximum(rows, 0)],
            alike=None if alike is None else alike[np.maximum(rows, 0)],
        ),
        None if np.array_equal(rows, np.arange(size)) else rows,
        total - copies,
        copies,
        excluded,
        costs,
        prompts,
        alike,
    )
    if costs is None:
        return made
    prices = made.gather(costs.astype(np.float32))
    return dataclasses.replace(made, space=_changed(made.space, costs=np.where(prices > 0, prices, np.float32(1))))


def _room(count: int) -> int:
    """A number of responses, prompts or pairs rounded up."""
    return bucket(count, per_octave=1 if count <= FINE else 4)


def _width(counts: np.ndarray) -> int:
    """Places for the responses of a prompt in a grid, where a prompt has so many."""
    return bucket(int(counts.max()), per_octave=2)


def codes_of(prompts: Any, size: int) -> tuple[np.ndarray, list[Id]]:
    """Prompts numbered in order of first appearance: `[N]` int64 codes, and the prompt of each code.

    Raises:
      JarmError: not one prompt per response, a missing prompt, or one that is no id.
    """
    ids = read_ids("prompts", prompts, lambda row: f"The prompt of response {row}")
    if len(ids) != size:
        raise JarmError(f"prompts has {len(ids)} entries for {size} responses: give the prompt of each response.")
    return code_ids(ids)


def _space(**fields: Any) -> PairSpace:
    """A space of NumPy arrays: jit takes them as they are, and nothing is compiled to make one."""
    return PairSpace(**{"excluded": np.zeros((0, 2), np.int32)} | fields)


def _changed(space: PairSpace, **fields: Any) -> PairSpace:
    return dataclasses.replace(space, **fields)


def _keys(pairs: np.ndarray) -> np.ndarray:
    """One number per pair, rising in lexicographic order."""
    return (pairs[:, 0].astype(np.int64) << 31) + pairs[:, 1]


def _listed(
    pairs: np.ndarray,
    size: int,
    prompts: np.ndarray | None,
    costs: np.ndarray | None,
    excluded: np.ndarray,
    alike: np.ndarray | None,
) -> Candidates:
    """A sorted list, each pair once, padded."""
    pairs, copies, room = np.sort(pairs, axis=1), 0, _room(size)
    length = _room(len(pairs))
    if alike is not None:
        same = alike[pairs[:, 0]] == alike[pairs[:, 1]]
        copies = len(np.unique(_keys(pairs[same])))
        pairs, costs = pairs[~same], None if costs is None else costs[~same]
    if costs is not None:
        order = np.lexsort((costs, pairs[:, 1], pairs[:, 0]))
        pairs, costs = pairs[order], costs[order].astype(np.float32)
    keys, first = np.unique(_keys(pairs), return_index=True)
    space = _space(
        kind="listed",
        width=1,
        eligible=np.arange(room) < size,
        pairs=padded(pairs[first].astype(np.int32), length, room),
        costs=None if costs is None else padded(costs[first], length, 1),
        prompt=None if prompts is None else padded(prompts.astype(np.int32), room),
    )
    rows = None if room == size else padded(np.arange(size), room, -1)
    return Candidates(space, rows, len(first), copies, excluded[np.isin(_keys(excluded), keys)])


def _count_copies(kind: str, prompts: np.ndarray | None, alike: np.ndarray | None) -> int:
    """Number of pairs of a kind that are of responses with equal features."""
    if alike is None:
        return 0
    every = int(count_alike(alike, np.zeros_like(alike)).sum())
    if kind == "all":
        return every
    assert prompts is not None
    within = int(count_alike(alike, prompts).sum())
    return within if kind == "within" else every - within


def _grid(prompts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The responses of every prompt with two or more, side by side, padded with -1 to a width and number, `[P R]`."""
    order = np.argsort(prompts, kind="stable")
    place = np.arange(len(prompts)) - np.repeat(np.cumsum(counts) - counts, counts)
    row = np.cumsum(counts > 1) - 1
    sorted_prompts = prompts[order]
    paired = counts[sorted_prompts] > 1
    grid = np.full((_room(int((counts > 1).sum())), _width(counts)), -1, np.int64)
    grid[row[sorted_prompts[paired]], place[paired]] = order[paired]
    return grid.reshape(-1)


def _pairs_within(prompts: np.ndarray) -> np.ndarray:
    """Every pair within a prompt, `[M, 2]`: all prompts of equal size at once."""
    counts = np.bincount(prompts)
    order = np.argsort(prompts, kind="stable")
    start = np.cumsum(counts) - counts
    found = [np.zeros((0, 2), np.int64)]
    for count in np.unique(counts[counts > 1]):
        members = order[start[counts == count][:, None] + np.arange(count)]
        first, second = np.triu_indices(count, 1)
        found.append(np.stack([members[:, first], members[:, second]], axis=-1).reshape(-1, 2))
    return np.concatenate(found)
