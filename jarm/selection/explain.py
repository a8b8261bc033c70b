"""Why a batch is what it is: its numbers recomputed in float64 on the host, and a table that says them."""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from jarm.selection.replay import _CHUNK, sigmoid, whitener
from jarm.selection.result import Reason

_NORMAL_95 = 1.959963984540054


def reasons(
    pairs: np.ndarray,
    gains: np.ndarray,
    cost: np.ndarray | None,
    names: Sequence[Sequence[Hashable]],
    margin: np.ndarray,
    x: np.ndarray,
    labelled: np.ndarray,
    differences: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
) -> tuple[Reason, ...]:
    """Why each pair of a batch was chosen.

    Args:
      pairs, gains, cost: `[k, 2]`, `[k]`, `[k]` or None.
      names: the prompts of each pair.
      margin, x: `[k]`, `[k, F]`.
      labelled: `[L, 2]` labelled pairs.
      differences: pairs `[n, 2]` -> their feature differences `[n, F]`.
      start: `[F, F]` information that the batch starts from.
    """
    whiten = whitener(start)
    y = x @ whiten.T
    sd = np.sqrt(np.square(y).sum(axis=1))
    nearest, cosine = _nearest(_unit(y), labelled, lambda some: _unit(differences(some) @ whiten.T))
    p, p_sd = sigmoid(margin), sigmoid(margin) * sigmoid(-margin) * sd
    low, high = sigmoid(margin - _NORMAL_95 * sd), sigmoid(margin + _NORMAL_95 * sd)
    return tuple(
        Reason(
            first=first,
            second=second,
            prompts=tuple(names[at]),
            gain=float(gains[at]),
            cost=None if cost is None else float(cost[at]),
            margin=float(margin[at]),
            margin_sd=float(sd[at]),
            p=float(p[at]),
            p_sd=float(p_sd[at]),
            p_low=float(low[at]),
            p_high=float(high[at]),
            nearest=int(nearest[at]) if len(labelled) else None,
            cosine=float(cosine[at]) if len(labelled) else None,
        )
        for at, (first, second) in enumerate(pairs.tolist())
    )


def _unit(y: np.ndarray) -> np.ndarray:
    length = np.sqrt(np.square(y).sum(axis=1, keepdims=True))
    return y / np.where(length > 0, length, 1)


def _nearest(
    y: np.ndarray, labelled: np.ndarray, directions: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Of each row the labelled pair of largest cosine, in size, and that cosine."""
    nearest, best = np.zeros(len(y), np.int64), np.full(len(y), -1.0)
    for at in range(0, len(labelled), _CHUNK):
        cosine = np.abs(y @ directions(labelled[at : at + _CHUNK]).T)
        most = cosine.argmax(axis=1)
        value = cosine[np.arange(len(y)), most]
        nearest, best = np.where(value > best, at + most, nearest), np.maximum(best, value)
    return nearest, np.minimum(best, 1)


def counted(names: Sequence[Sequence[Hashable]]) -> dict[Any, int]:
    """How many of the pairs have each name, most first; a pair counts once for a name."""
    return dict(collections.Counter(name for some in names for name in set(some)).most_common())
