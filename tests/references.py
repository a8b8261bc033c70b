"""Float64 references that list every pair, and the greedy batch of any criterion by trying all of them.

Written from the definitions (determinants, inverses, joint Gaussians, dense quadrature) and not from the rank-one
formulas under test, with which they share no code. Slow and small.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jarm.core.base import Limits, PairSpace
from jarm.testing.references import differences64, information64, list_pairs, weights64

Gains64 = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""`(information [F, F], x [M, F], margins [M]) -> [M]`: the gain of each pair by itself."""


def leverages64(features: np.ndarray, rewards: np.ndarray | None, pairs: np.ndarray, metric: np.ndarray) -> np.ndarray:
    """v x^T metric^-1 x of pairs, `[M]`; v = 1 without rewards."""
    x = differences64(features, pairs)
    v = np.ones(len(pairs)) if rewards is None else weights64(rewards, pairs)
    return v * (x * np.linalg.solve(metric, x.T).T).sum(axis=1)


def log_det64(features: np.ndarray, rewards: np.ndarray, pairs: np.ndarray, information: np.ndarray) -> float:
    """log det of the information with that of the pairs added."""
    sign, value = np.linalg.slogdet(np.asarray(information, np.float64) + information64(features, rewards, pairs))
    assert sign > 0
    return float(value)


def gains64(features: np.ndarray, rewards: np.ndarray, pairs: np.ndarray, information: np.ndarray) -> np.ndarray:
    """log det(A + v x x^T) - log det A of every pair by itself, as a difference of determinants, `[M]`."""
    x = differences64(features, pairs)
    grown = information + weights64(rewards, pairs)[:, None, None] * x[:, :, None] * x[:, None, :]
    return np.linalg.slogdet(grown)[1] - np.linalg.slogdet(information)[1]


class Greedy(NamedTuple):
    """A greedy batch: indices `[k]` into the pairs, and gains `[k]` in nats."""

    picks: np.ndarray
    gains: np.ndarray


def greedy64(features: np.ndarray, rewards: np.ndarray, pairs: np.ndarray, information: np.ndarray, k: int) -> Greedy:
    """Grow a batch by the pair of largest log det gain, trying every pair that is left at every step."""
    information = np.array(information, np.float64)
    left = np.ones(len(pairs), bool)
    picks, gains = [], []
    for _ in range(min(k, len(pairs))):
        gain = np.where(left, gains64(features, rewards, pairs, information), -np.inf)
        best = int(gain.argmax())
        picks.append(best)
        gains.append(gain[best])
        left[best] = False
        information = information + information64(features, rewards, pairs[[best]])
    return Greedy(np.array(picks, np.int64), np.array(gains))


def greedy_shortfall(
    features: np.ndarray, rewards: np.ndarray, pairs: np.ndarray, information: np.ndarray, picks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Replay picks: the shortfall of each from the best pair then left, and its gain.

    A replay judges every choice given the choices before it, so one near-tie does not spoil the rest.

    Args:
      features: `[N, F]`.
      rewards: `[N]`.
      pairs: `[M, 2]`, every pair of the space.
      information: `[F, F]` to start from.
      picks: `[k, 2]` pairs in the order of choice.

    Returns:
      `[k]` best gain minus gain of the pick, and `[k]` gain of the pick, in nats.
    """
    place = {tuple(pair): index for index, pair in enumerate(pairs.tolist())}
    information = np.array(information, np.float64)
    left = np.ones(len(pairs), bool)
    short, gained = [], []
    for pick in np.asarray(picks).tolist():
        index = place[tuple(pick)]
        assert left[index], f"{pick} was picked twice"
        gain = gains64(features, rewards, pairs, information)
        short.append(gain[left].max() - gain[index])
        gained.append(gain[index])
        left[index] = False
        information = information + information64(features, rewards, pairs[[index]])
    return np.array(short), np.array(gained)


def best_subset64(
    features: np.ndarray, rewards: np.ndarray, pairs: np.ndarray, information: np.ndarray, k: int
) -> float:
    """The largest `log_det64` of any k pairs, by enumeration."""
    subsets = itertools.combinations(range(len(pairs)), k)
    return max(log_det64(features, rewards, pairs[list(subset)], information) for subset in subsets)


class Criterion64(NamedTuple):
    """The gains of pairs, and whether a pair adds v x x^T to the information or x x^T."""

    gains: Gains64
    weighted: bool = True


def fisher64(margins: np.ndarray) -> np.ndarray:
    """sigmoid(m) sigmoid(-m)."""
    return np.exp(-np.logaddexp(0, -margins) - np.logaddexp(0, margins))


def _grown(information: np.ndarray, x: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The information with each pair added, `[M, F, F]`."""
    return information + v[:, None, None] * x[:, :, None] * x[:, None, :]


def d_optimal64(*, weighted: bool = True) -> Criterion64:
    """Growth of the log determinant of the information."""

    def gains(information: np.ndarray, x: np.ndarray, margins: np.ndarray) -> np.ndarray:
        v = fisher64(margins) if weighted else np.ones(len(x))
        return np.linalg.slogdet(_grown(information, x, v))[1] - np.linalg.slogdet(information)[1]

    return Criterion64(gains, weighted)


def v_optimal64(targets: np.ndarray, weights: np.ndarray) -> Criterion64:
    """Fall of sum_t weight_t t^T A^-1 t."""
    of_targets = targets.T.astype(np.float64) @ (weights[:, None] * targets)

    def gains(information: np.ndarray, x: np.ndarray, margins: np.ndarray) -> np.ndarray:
        fall = np.linalg.inv(information) - np.linalg.inv(_grown(information, x, fisher64(margins)))
        return (fall * of_targets).sum(axis=(1, 2))

    return Criterion64(gains)


def epig64(targets: np.ndarray, target_margins: np.ndarray) -> Criterion64:
    """Mean mutual information of the labels of a pair and a target, Gaussians of noise 1 / v: half a log ratio."""
    targets, noise = targets.astype(np.float64), 1 / fisher64(target_margins.astype(np.float64))

    def gains(information: np.ndarray, x: np.ndarray, margins: np.ndarray) -> np.ndarray:
        inverse = np.linalg.inv(information)
        own = np.einsum("mf,fg,mg->m", x, inverse, x) + 1 / np.maximum(fisher64(margins), 1e-300)
        theirs = np.einsum("tf,fg,tg->t", targets, inverse, targets) + noise
        correlation = x @ inverse @ targets.T / np.sqrt(own[:, None] * theirs[None, :])
        return (-np.log1p(-(correlation**2)) / 2).mean(axis=1)

    return Criterion64(gains)


def mutual_information64(margins: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """E KL(p | E p), p the sigmoid of N(m, q), by the trapezoid rule with steps of at most half a unit of the margin.

    The poles of the sigmoid lie pi away, so the error is exp(-2 pi^2 / step), less than float64 resolves.
    """
    m, root = (np.asarray(each, np.float64)[..., None] for each in (margins, np.sqrt(variances)))
    step = min(0.25, 0.5 / max(float(root.max(initial=0)), 1e-9))
    z = step * np.arange(-int(9.5 / step) - 1, int(9.5 / step) + 2)
    share = np.exp(-(z**2) / 2)
    share /= share.sum()
    t = m + root * z
    first, second = -np.logaddexp(0, -t), -np.logaddexp(0, t)
    information = np.zeros(np.broadcast_shapes(m.shape, root.shape)[:-1])
    for log_p in (first, second):
        p = np.exp(log_p)
        mean = (share * p).sum(axis=-1, keepdims=True)
        information += (share * p * (log_p - np.log(np.maximum(mean, 1e-300)))).sum(axis=-1)
    return information


def bald64() -> Criterion64:
    """Mutual information of a label and the last layer, whose margin is N(m, x^T A^-1 x)."""

    def gains(information: np.ndarray, x: np.ndarray, margins: np.ndarray) -> np.ndarray:
        return mutual_information64(margins, np.einsum("mf,fg,mg->m", x, np.linalg.inv(information), x))

    return Criterion64(gains)


class Steps64(NamedTuple):
    """A batch, step by step.

    Attributes:
      pairs: `[n, 2]` the pairs chosen.
      gains: `[n]` gain of each (per cost).
      best: `[n]` largest gain of any pair then possible (per cost).
      left: number of pairs still possible at the end.
    """

    pairs: np.ndarray
    gains: np.ndarray
    best: np.ndarray
    left: int


def costs64(space: PairSpace, pairs: np.ndarray) -> np.ndarray:
    """Costs of pairs, `[M]`; 1 where the space has none."""
    if space.costs is None:
        return np.ones(len(pairs))
    costs = np.asarray(space.costs, np.float64)
    if space.pairs is None:
        return costs[pairs].sum(axis=1)
    price: dict[tuple[int, ...], float] = {}
    for pair, cost in zip(np.asarray(space.pairs).tolist(), costs, strict=True):
        price[tuple(pair)] = min(cost, price.get(tuple(pair), np.inf))
    return np.array([price[tuple(pair)] for pair in pairs.tolist()])


def possible64(
    space: PairSpace, limits: Limits, pairs: np.ndarray, x: np.ndarray, batch: list[int], tolerance: float
) -> np.ndarray:
    """Whether each pair may be added to a batch, `[M]`, by the definition of the limits.

    A cosine may exceed the limit of similarity by `tolerance`.
    """
    per_response: Any = np.inf if limits.per_response is None else int(limits.per_response)
    per_prompt: Any = np.inf if limits.per_prompt is None else int(limits.per_prompt)
    similarity = np.inf if limits.similarity is None else float(limits.similarity)
    size = len(space.eligible)
    prompt_of = np.arange(size) // space.width if space.prompt is None else np.asarray(space.prompt)
    uses: dict[int, int] = {}
    prompt_uses: dict[int, int] = {}
    for index in batch:
        for end in pairs[index].tolist():
            uses[end] = uses.get(end, 0) + 1
        for prompt in {prompt_of[end] for end in pairs[index].tolist()}:
            prompt_uses[prompt] = prompt_uses.get(prompt, 0) + 1
    length = np.sqrt((x**2).sum(axis=1))
    possible = np.ones(len(pairs), bool)
    for index, ends in enumerate(pairs.tolist()):
        possible[index] = index not in batch
        possible[index] &= all(uses.get(end, 0) < per_response for end in ends)
        possible[index] &= all(prompt_uses.get(prompt_of[end], 0) < per_prompt for end in ends)
    for index in batch:
        both = length * length[index]
        possible &= ~((both > 0) & (np.abs(x @ x[index]) >= (similarity + tolerance) * both))
    return possible


def greedy_steps64(
    criterion: Criterion64,
    features: np.ndarray,
    rewards: np.ndarray,
    space: PairSpace,
    information: np.ndarray,
    k: int,
    *,
    limits: Limits | None = None,
    picks: np.ndarray | None = None,
    tolerance: float = 1e-5,
) -> Steps64:
    """Grow a batch by the possible pair of largest gain (per cost), or replay one.

    A replay judges each pick given the picks before it, so one near-tie does not spoil the rest.

    Args:
      criterion: gains of pairs.
      features: `[N, F]`.
      rewards: `[N]`.
      space: which pairs.
      information: `[F, F]` to start from.
      k: pairs to pick.
      limits: of the batch.
      picks: `[n, 2]` pairs in the order of choice, to be replayed; None to choose.
      tolerance: of the limit of similarity, in a replay: a pick may exceed the limit by it, and the best pair is sought
        among those below the limit by it, because rounding decides the others.

    Raises:
      AssertionError: a pick is not one of the possible pairs.
    """
    limits = Limits() if limits is None else limits
    tolerance = 0.0 if picks is None else tolerance
    pairs = list_pairs(space)
    place = {tuple(pair): index for index, pair in enumerate(pairs.tolist())}
    x = differences64(features, pairs)
    rewards = np.asarray(rewards, np.float64)
    margins = rewards[pairs[:, 0]] - rewards[pairs[:, 1]]
    v = fisher64(margins) if criterion.weighted else np.ones(len(pairs))
    costs = costs64(space, pairs)
    information = np.array(information, np.float64)
    batch: list[int] = []
    gained, best = [], []
    for step in range(k if picks is None else len(picks)):
        possible = possible64(space, limits, pairs, x, batch, -tolerance)
        if picks is None and not possible.any():
            break
        gains = criterion.gains(information, x, margins) / costs
        offered = np.where(possible, gains, -np.inf)
        if picks is None:
            index = int(offered.argmax())
        else:
            index = place[tuple(np.asarray(picks)[step].tolist())]
            assert possible64(space, limits, pairs, x, batch, tolerance)[index], f"pick {step} breaks the limits"
        gained.append(gains[index])
        best.append(max(offered.max(), gains[index]))
        batch.append(index)
        information = information + v[index] * np.outer(x[index], x[index])
    left = int(possible64(space, limits, pairs, x, batch, tolerance).sum())
    return Steps64(pairs[np.array(batch, np.int64)], np.array(gained), np.array(best), left)
