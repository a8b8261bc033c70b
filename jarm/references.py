"""For tests: the greedy batch of any criterion, space and constraint in float64, by trying every pair at every step.

Written from the definitions (determinants, inverses, joint Gaussians, dense quadrature) and not from the rank-one
formulas of what it judges, with which it shares no code. Slow and small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jarm.base import Limits, PairSpace
from jarm.testing import differences64, list_pairs

Gains64 = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""`(information [F, F], x [M, F], margins [M]) -> [M]`: what each pair would gain by itself."""


class Criterion64(NamedTuple):
    """What pairs gain, and whether a pair adds v x x^T to the information or x x^T."""

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
    """Mean information between the label of a pair and that of a target, as Gaussians of noise 1 / v: half the log of
    the determinants' ratio."""
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

    For the poles of the sigmoid at a distance of pi it errs by exp(-2 pi^2 / step), less than float64 resolves.
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
      gains: `[n]` what each gained (for its cost).
      best: `[n]` the most that any pair then possible would have gained (for its cost).
      left: how many pairs were still possible in the end.
    """

    pairs: np.ndarray
    gains: np.ndarray
    best: np.ndarray
    left: int


def costs64(space: PairSpace, pairs: np.ndarray) -> np.ndarray:
    """What pairs cost, `[M]`; 1 where the space has no costs."""
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
    space: PairSpace, limits: Limits, pairs: np.ndarray, x: np.ndarray, batch: list[int], doubt: float
) -> np.ndarray:
    """Which pairs may be added to a batch of some of them, `[M]`: one by one, by definition.

    A cosine may exceed the limit of similarity by `doubt`.
    """
    per_response: Any = np.inf if limits.per_response is None else int(limits.per_response)
    per_prompt: Any = np.inf if limits.per_prompt is None else int(limits.per_prompt)
    similarity = np.inf if limits.similarity is None else float(limits.similarity)
    size = len(space.eligible)
    home = np.arange(size) // space.width if space.prompt is None else np.asarray(space.prompt)
    uses: dict[int, int] = {}
    prompt_uses: dict[int, int] = {}
    for index in batch:
        for end in pairs[index].tolist():
            uses[end] = uses.get(end, 0) + 1
        for prompt in {home[end] for end in pairs[index].tolist()}:
            prompt_uses[prompt] = prompt_uses.get(prompt, 0) + 1
    length = np.sqrt((x**2).sum(axis=1))
    fine = np.ones(len(pairs), bool)
    for index, ends in enumerate(pairs.tolist()):
        fine[index] = index not in batch
        fine[index] &= all(uses.get(end, 0) < per_response for end in ends)
        fine[index] &= all(prompt_uses.get(home[end], 0) < per_prompt for end in ends)
    for index in batch:
        both = length * length[index]
        fine &= ~((both > 0) & (np.abs(x @ x[index]) >= (similarity + doubt) * both))
    return fine


def greedy_steps64(
    criterion: Criterion64,
    features: np.ndarray,
    rewards: np.ndarray,
    space: PairSpace,
    prior: np.ndarray,
    k: int,
    *,
    limits: Limits | None = None,
    picks: np.ndarray | None = None,
    doubt: float = 1e-5,
) -> Steps64:
    """Grow a batch by the pair of largest gain (for its cost) of all that are possible, or replay one.

    A replay judges each pick given the picks before it, so that one near-tie does not make all that follows differ.

    Args:
      criterion: what pairs gain.
      features: `[N, F]`.
      rewards: `[N]`.
      space: which pairs.
      prior: `[F, F]`.
      k: pairs to pick.
      limits: what the batch has to keep to.
      picks: `[n, 2]` pairs in the order of choice, to be replayed; None to choose.
      doubt: in a replay, a pick may be as much more similar to another than the limit, and the best pair is looked for
        among those that are as much less: rounding decides of the others.

    Raises:
      AssertionError: a pick is not one of the possible pairs.
    """
    limits = Limits() if limits is None else limits
    doubt = 0.0 if picks is None else doubt
    pairs = list_pairs(space)
    place = {tuple(pair): index for index, pair in enumerate(pairs.tolist())}
    x = differences64(features, pairs)
    rewards = np.asarray(rewards, np.float64)
    margins = rewards[pairs[:, 0]] - rewards[pairs[:, 1]]
    v = fisher64(margins) if criterion.weighted else np.ones(len(pairs))
    costs = costs64(space, pairs)
    information = np.array(prior, np.float64)
    batch: list[int] = []
    gained, best = [], []
    for step in range(k if picks is None else len(picks)):
        surely = possible64(space, limits, pairs, x, batch, -doubt)
        if picks is None and not surely.any():
            break
        gains = criterion.gains(information, x, margins) / costs
        most = np.where(surely, gains, -np.inf)
        if picks is None:
            index = int(most.argmax())
        else:
            index = place[tuple(np.asarray(picks)[step].tolist())]
            assert possible64(space, limits, pairs, x, batch, doubt)[index], f"pick {step} breaks the limits"
        gained.append(gains[index])
        best.append(max(most.max(), gains[index]))
        batch.append(index)
        information = information + v[index] * np.outer(x[index], x[index])
    left = int(possible64(space, limits, pairs, x, batch, doubt).sum())
    return Steps64(pairs[np.array(batch, np.int64)], np.array(gained), np.array(best), left)
