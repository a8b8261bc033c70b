"""Float64 references of the conformance checks: the pairs of a space by definition, and sums over them."""

from __future__ import annotations

import itertools

import numpy as np

from jarm.core.base import PairSpace


def list_pairs(space: PairSpace) -> np.ndarray:
    """Every pair of a space, `[M, 2]`, smaller index first, in lexicographic order, by the definition of the space."""
    eligible = np.asarray(space.eligible)
    size = len(eligible)
    prompt_of = np.arange(size) // space.width if space.prompt is None else np.asarray(space.prompt)
    excluded = {tuple(sorted(pair)) for pair in np.asarray(space.excluded).tolist()}
    if space.pairs is not None:
        offered = sorted({tuple(sorted(pair)) for pair in np.asarray(space.pairs).tolist() if max(pair) < size})
    else:
        offered = list(itertools.combinations(range(size), 2))
    kept = []
    for i, j in offered:
        same = prompt_of[i] == prompt_of[j]
        inside = {"within": same, "cross": not same, "all": True, "listed": True}[space.kind]
        inside &= space.alike is None or int(space.alike[i]) != int(space.alike[j])
        if inside and i != j and eligible[i] and eligible[j] and (i, j) not in excluded:
            kept.append((i, j))
    return np.array(kept, np.int64).reshape(-1, 2)


def weights64(rewards: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Fisher weights sigmoid(m) sigmoid(-m) of pairs, `[M]`, m the margin."""
    rewards = np.asarray(rewards, np.float64)
    margin = rewards[pairs[:, 0]] - rewards[pairs[:, 1]]
    # log sigmoid(m) = -log(1 + exp(-m))
    return np.exp(-np.logaddexp(0, -margin) - np.logaddexp(0, margin))


def differences64(features: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Feature differences x of pairs, `[M, F]`."""
    features = np.asarray(features, np.float64)
    return features[pairs[:, 0]] - features[pairs[:, 1]]


def information64(features: np.ndarray, rewards: np.ndarray | None, pairs: np.ndarray) -> np.ndarray:
    """The explicit sum over pairs of v x x^T, `[F, F]`; v = 1 without rewards."""
    x = differences64(features, pairs)
    v = np.ones(len(pairs)) if rewards is None else weights64(rewards, pairs)
    return (v[:, None, None] * x[:, :, None] * x[:, None, :]).sum(axis=0)
