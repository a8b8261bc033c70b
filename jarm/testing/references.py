"""For tests: float64 references that list every pair, and the greedy batch of any criterion by trying all of them.

Written from the definitions (determinants, inverses, joint Gaussians, dense quadrature) and not from the rank-one
formulas of what they judge, with which they share no code. Slow and small.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jarm.core.base import Limits, PairSpace

Gains64 = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""`(information [F, F], x [M, F], margins [M]) -> [M]`: what each pair would gain by itself."""


def list_pairs(space: PairSpace) -> np.ndarray:
    """Every pair of a space, `[M, 2]`, smaller index first, in lexicographic order: one by one, by definition."""
    eligible = np.asarray(space.eligible)
    size = len(eligible)
    home = np.arange(size) // space.width if space.prompt is None else np.asarray(space.prompt)
    excluded = {tuple(sorted(pair)) for pair in np.asarray(space.excluded).tolist()}
    if space.pairs is not None:
        offered = sorted({tuple(sorted(pair)) for pair in np.asarray(space.pairs).tolist() if max(pair) < size})
    else:
        offered = list(itertools.combinations(range(size), 2))
    kept = []
    for i, j in offered:
        same = home[i] == home[j]
        inside = {"within": same, "cross": not same, "all": True, "listed": True}[space.kind]
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


def leverages64(features: np.ndarray, rewards: np.ndarray | None, pairs: np.ndarray, metric: np.ndarray) -> np.ndarray:
    """v x^T metric^-1 x of pairs, `[M]`; v = 1 without rewards."""
    x = differences64(features, pairs)
    v = np.ones(len(pairs)) if rewards is None else weights64(rewards, pairs)
    return v * (x * np.linalg.solve(metric, x.T).T).sum(axis=1)


def log_det64(features: np.ndarray, rewards: np.ndarray, pairs: np.ndarray, prior: np.ndarray) -> float:
    """log det(prior + information of the pairs)."""
    sign, value = np.linalg.slogdet(np.asarray(prior, np.float64) + information64(features, rewards, pairs))
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


def greedy64(features: np.ndarray, rewards: np.ndarray, pairs: np.ndarray, prior: np.ndarray, k: int) -> Greedy:
    """Grow a batch by the pair of largest log det gain, trying every pair that is left at every step."""
    information = np.array(prior, np.float64)
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
    features: np.ndarray, rewards: np.ndarray, pairs: np.ndarray, prior: np.ndarray, picks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Replay picks: how far each fell short of the best pair then left, and what each gained.

    A replay judges every choice given the choices before it, so one near-tie does not make all that follows differ.

    Args:
      features: `[N, F]`.
      rewards: `[N]`.
      pairs: `[M, 2]`, every pair of the space.
      prior: `[F, F]`.
      picks: `[k, 2]` pairs in the order of choice.

    Returns:
      `[k]` best gain minus gain of the pick, and `[k]` gain of the pick, in nats.
    """
    place = {tuple(pair): index for index, pair in enumerate(pairs.tolist())}
    information = np.array(prior, np.float64)
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


def best_subset64(features: np.ndarray, rewards: np.ndarray, pairs: np.ndarray, prior: np.ndarray, k: int) -> float:
    """The largest log det(prior + information) of any k pairs, by enumeration."""
    subsets = itertools.combinations(range(len(pairs)), k)
    return max(log_det64(features, rewards, pairs[list(subset)], prior) for subset in subsets)


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
