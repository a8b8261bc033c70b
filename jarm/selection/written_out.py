"""The greedy batch of a space of few pairs: every pair written out, in NumPy and float64, with nothing to compile.

The algorithm is that of `jarm.design.greedy` with a shortlist that holds the whole space.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jarm.core.base import Limits, Selection
from jarm.core.status import Status
from jarm.design.criteria import Criterion
from jarm.design.greedy import GreedyInfo
from jarm.selection.replay import LOST, root_of, solved, squares, whitener
from jarm.selection.worths import gains_of


class Written(NamedTuple):
    """Every pair of a space.

    Attributes:
      pairs: `[M, 2]` int64, in lexicographic order.
      x: `[M, F]` float64 feature differences.
      margin, weight: `[M]` margins and weights v.
      costs: `[M]`, or None.
      prompts: `[M, 2]` the prompts of both ends, or None.
      offered: `[M]` bool, false for excluded pairs.
    """

    pairs: np.ndarray
    x: np.ndarray
    margin: np.ndarray
    weight: np.ndarray
    costs: np.ndarray | None
    prompts: np.ndarray | None
    offered: np.ndarray


def greedy_written_out(
    criterion: Criterion, written: Written, start: np.ndarray, k: int, limits: Limits
) -> tuple[Selection, GreedyInfo]:
    """Grow a batch one pair at a time, each the best of all pairs.

    Args:
      criterion: a `known` one.
      written: the pairs.
      start: `[F, F]` information to start from.
      k: pairs to pick.
      limits: limits on the batch.

    Returns:
      The batch and its certificate, as of `jarm.design.greedy.greedy`; fewer pairs than k where the limits leave fewer.
    """
    directions = np.zeros((0, len(start))) if criterion.targets is None else np.asarray(criterion.targets, np.float64)
    both, scaled = np.concatenate([written.x, directions]), np.sqrt(written.weight)[:, None] * written.x
    lengths = np.sqrt(squares(written.x))
    price = np.ones(len(written.x)) if written.costs is None else written.costs
    chosen, gains, left = list[int](), list[float](), written.offered.copy()
    coordinates = _Coordinates(both @ whitener(start).T, len(written.x))
    while len(chosen) < k and left.any():
        gain = gains_of(criterion, written.margin, written.weight, coordinates.q, coordinates.c, coordinates.h)
        place = int(np.where(left, gain / price, -np.inf).argmax())
        chosen.append(place)
        gains.append(gain[place] / price[place])
        left[place] = False
        left &= _allowed(written, lengths, chosen, limits)
        coordinates.add(place, written.weight[place])
        if (coordinates.q[left] < LOST * coordinates.fresh[left]).any():
            coordinates = _Coordinates(solved(root_of(start, scaled[chosen]), both), len(written.x))
    return _result(written, chosen, gains, k)


class _Coordinates:
    """Variances q `[M]` and h `[G]` of pairs and targets and their covariances c `[M, G]`, as the batch grows.

    They are kept in coordinates in which the information was the identity when these were made; `fresh` is q then.
    """

    def __init__(self, y: np.ndarray, count: int) -> None:
        self._y, self._z, self._inverse = y[:count], y[count:], np.eye(y.shape[1])
        self.fresh = self.q = squares(self._y)
        self.h = squares(self._z)
        self.c = self._y @ self._z.T

    def add(self, place: int, weight: float) -> None:
        """Let the batch grow by a pair."""
        along = self._inverse @ self._y[place]
        share = weight / (1 + weight * self.q[place])
        with_pairs, with_targets = self._y @ along, self._z @ along
        self._inverse -= share * np.outer(along, along)
        self.q = np.maximum(self.q - share * np.square(with_pairs), 0)
        self.h = np.maximum(self.h - share * np.square(with_targets), 0)
        if self.c.size:
            self.c -= np.outer(share * with_pairs, with_targets)


def _allowed(written: Written, lengths: np.ndarray, chosen: list[int], limits: Limits) -> np.ndarray:
    """Which pairs `[M]`, of differences of these lengths, the limits allow, given that they did before the last one."""
    last, allowed = chosen[-1], np.ones(len(written.pairs), bool)
    of_ends = ((limits.per_response, written.pairs), (limits.per_prompt, written.prompts))
    for maximum, ids in of_ends:
        if maximum is None or ids is None:
            continue
        for one in np.unique(ids[last]):
            if (ids[chosen] == one).any(axis=1).sum() >= maximum:
                allowed &= ~(ids == one).any(axis=1)
    if limits.similarity is not None:
        both = lengths * lengths[last]
        allowed &= (np.abs(written.x @ written.x[last]) < limits.similarity * both) | (both == 0)
    return allowed


def _result(written: Written, chosen: list[int], gains: list[float], k: int) -> tuple[Selection, GreedyInfo]:
    count = len(chosen)
    pairs: Any = np.zeros((k, 2), np.int64)
    pairs[:count] = written.pairs[chosen]
    narrow: Any = np.zeros(k, np.float32)
    narrow[:count] = gains
    idle = (narrow[:count] <= 0).any()
    status: Any = np.int32(Status.LIMITED if count < k else Status.UNINFORMATIVE if idle else Status.OK)
    place: Any = np.arange(k)
    outside: Any = np.full(k, -np.inf, np.float32)  # of the shortlist there is nothing
    passes: Any = np.int32(1)
    return Selection(pairs, narrow, place < count, status), GreedyInfo(passes, outside, place == 0)
