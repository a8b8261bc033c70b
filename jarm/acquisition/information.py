"""Rules by the information of a label: disagreement of an ensemble, and information under a Laplace posterior.

An ensemble describes a pair by the margins d_m = r_mi - r_mj of its members and p_m = sigmoid(d_m); errors that all
members share about both responses cancel in d_m. A Laplace posterior of the last layer describes a pair by the margin
and its variance q = x^T A^-1 x, A the prior and labelled information (`optimal_design.prior_information`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jarm.acquisition.optimal_design import prior_information
from jarm.core.base import Belief, HParams, PairSpace, Selection
from jarm.core.linalg import distances, inverse_factor, matmul, square_sum
from jarm.core.status import Status
from jarm.core.types import Array, Float, PRNGKey
from jarm.design.criteria import BALD, Numbers
from jarm.design.criteria import epig as epig_criterion
from jarm.design.fisher import centred
from jarm.design.greedy import greedy
from jarm.design.scorer import Scorer
from jarm.design.spaces import max_pairs, sample_pairs, subset
from jarm.design.top import best_first, top_pairs, top_scores

TARGETS = 64
"""Pairs whose labels are the targets of `epig`."""
CANDIDATES = 8192
"""Candidates of `epig` where a space may hold more pairs."""

Fold = Callable[[Callable[[Array, Array], Array]], Array]
"""Sums over members: `fold(f)` starts from 0 and calls `total = f(total, margin of a member)`."""


def member_scorer(rewards: Float[Array, "N K"], score: Callable[[Fold], Array]) -> Scorer:
    """Score pairs by the margins of the members, one member at a time in memory."""

    def fold(a: Array, b: Array, shape: tuple[int, ...]) -> Fold:
        def run(f: Callable[[Array, Array], Array]) -> Array:
            def step(total: Array, ends: tuple[Array, Array]) -> tuple[Array, None]:
                return f(total, ends[0] - ends[1] if not shape else jnp.subtract.outer(*ends)), None

            return jax.lax.scan(step, jnp.zeros(shape, jnp.float32), (a, b))[0]

        return run

    def pair(a: Array, b: Array) -> Array:
        return score(fold(a, b, ()))

    def tile(rows: Array, columns: Array) -> Array:
        return score(fold(rows.T, columns.T, (rows.shape[0], columns.shape[0])))

    return Scorer(rewards, pair, tile)


def chance(margin: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """sigmoid(margin), accurate to a few units in the last place even where it is small."""
    decay = jnp.exp(-jnp.abs(margin))
    return jnp.where(margin < 0, decay, 1) / (1 + decay)


def divergence(p: Float[Array, "*#b"], shift: Float[Array, "*#b"]) -> Float[Array, "*#b"]:
    """KL from a coin of chance p + shift to a coin of chance p, in nats, accurate for small shifts."""

    def side(p: Array, shift: Array) -> Array:
        # p g(shift / p), g(t) = (1 + t) log(1 + t) - t: of the two sides together, the terms -t cancel.
        t = shift / jnp.maximum(p, jnp.finfo(p.dtype).tiny)
        series = t * t * (1 / 2 - t * (1 / 6 - t * (1 / 12 - t * (1 / 20 - t * (1 / 30 - t / 42)))))
        whole = (1 + t) * jnp.log(jnp.maximum(1 + t, jnp.finfo(p.dtype).tiny)) - t
        return p * jnp.where(jnp.abs(t) < 0.1, series, whole)

    return side(p, shift) + side(1 - p, -shift)


def _less_likely(fold: Fold) -> Array:
    """+1 where the mean margin is negative, else -1: the sign of the less likely label, whose chance rounds to no 1."""
    return jnp.where(fold(jnp.add) < 0, 1.0, -1.0)


def bald_scorer(belief: Belief, space: PairSpace) -> Scorer:
    """BALD of pairs, H(mean_m p_m) - mean_m H(p_m) nats, as mean_m KL(p_m | mean p), without cancellation."""
    count = belief.member_rewards.shape[0]

    def score(fold: Fold) -> Array:
        side = _less_likely(fold)
        mean = fold(lambda total, margin: total + chance(side * margin)) / count
        return fold(lambda total, margin: total + divergence(mean, chance(side * margin) - mean)) / count

    return member_scorer(centred(belief.member_rewards.T, space), score)


def _top_of_members(belief: Belief, space: PairSpace, k: int, scorer: Scorer) -> Selection:
    return top_scores(scorer, jnp.isfinite(belief.member_rewards).all(axis=0), space, k)


def variance(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Pairs of the most uncertain margin under the members: the largest Var_m(r_mi - r_mj).

    Gain: that variance (unbiased, K - 1), the squared distance of two columns of centred member rewards over K - 1.
    Source: EnnUncertainty and infomax of Dwaracherla et al. (arXiv 2402.00396) and Liu et al. (arXiv 2411.01493).
    """
    rewards = belief.member_rewards
    scale = 1 / max(1, rewards.shape[0] - 1)
    deviations = (rewards - rewards.mean(axis=0, keepdims=True)).T
    return top_pairs(lambda _, distance: scale * distance, belief.rewards, deviations, space, k)


def variance_prob(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Pairs of the most uncertain probability under the members: the largest Var_m sigmoid(r_mi - r_mj).

    Gain: that variance (unbiased, K - 1). Pairs of a certain label count little, however much their margins vary.
    Source: Liu et al. (arXiv 2411.01493).
    """
    count = belief.member_rewards.shape[0]

    def score(fold: Fold) -> Array:
        side = _less_likely(fold)
        mean = fold(lambda total, margin: total + chance(side * margin)) / count
        squares = fold(lambda total, margin: total + jnp.square(chance(side * margin) - mean))
        return squares / max(1, count - 1)

    return _top_of_members(belief, space, k, member_scorer(centred(belief.member_rewards.T, space), score))


def bald(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Pairs whose label tells most about which member is right: the largest H(mean_m p_m) - mean_m H(p_m).

    Gain: that mutual information in nats, p_m = sigmoid(r_mi - r_mj). Each pair is scored alone (see `batch_bald`).
    Source: Houlsby et al. (arXiv 1112.5745), with the ensemble as the posterior.
    """
    return _top_of_members(belief, space, k, bald_scorer(belief, space))


def top_of_laplace(
    hparams: HParams, belief: Belief, space: PairSpace, k: int, scorer: Callable[[Numbers], Scorer]
) -> Selection:
    """The k best pairs by a score of centred rewards and of features whitened by `prior_information`."""
    whiten, singular = inverse_factor(prior_information(hparams, belief, space, k))
    y = matmul(centred(belief.features, space), whiten.T)
    finite = jnp.isfinite(belief.rewards) & jnp.isfinite(belief.features).all(axis=1)
    numbers = Numbers(centred(belief.rewards[:, None], space)[:, 0], y, y[:, :0])
    best = top_scores(scorer(numbers), finite, space, k)
    # A singular matrix makes all scores NaN: report it, unless the input is not finite.
    singular = jnp.where((finite | ~space.eligible).all(), singular, Status.OK)
    return dataclasses.replace(best, status=jnp.where(singular == Status.OK, best.status, singular))


def bald_laplace(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """BALD under the Laplace posterior of the last layer: the largest mutual information of label and weights.

    Gain: H(E p) - E H(p) nats, p = sigmoid(N(m, q)), q = x^T A0^-1 x with A0 of `prior_information`. Each pair is
    scored alone. Exact to 1e-6 (`jarm.design.criteria`), without the probit approximation.
    Source: Houlsby et al. (arXiv 1112.5745).
    """
    return top_of_laplace(hparams, belief, space, k, lambda numbers: BALD.scorer(numbers, jnp.zeros(0, jnp.float32)))


def greedy_bald_laplace(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """`bald_laplace` grown greedily: each pair tells most about the weights, given the pairs before it.

    Gain: H(E p) - E H(p) nats with q = x^T A^-1 x, A the information of the labelled pairs, the prior and the batch so
    far. Exact over every pair of the space. The labels of the batch enter by their expected (Fisher) information.
    Source: Houlsby et al. (arXiv 1112.5745), chosen greedily.
    """
    information = prior_information(hparams, belief, space, k)
    return greedy(BALD, belief.features, belief.rewards, space, information, k)[0]


def epig(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Pairs whose labels tell most about the labels of other pairs of the space: expected predictive information.

    Targets are 64 random pairs of the space. Grown greedily under the Laplace posterior with A0 of `prior_information`;
    see `jarm.design.criteria.epig` for the formula. A space that is not listed and may hold more than 8,192 pairs
    offers that many, drawn uniformly: gains may rise as a batch grows, so each choice takes a pass.

    Gain: mean information in nats about a target's label when the pair was chosen; the batch is listed by it.
    Source: Bickford Smith et al. (arXiv 2304.08151), who score each pair alone under sampled members.
    """
    key_targets, key_offered = jax.random.split(key)
    targets, valid = sample_pairs(key_targets, space, TARGETS)
    # In a space of fewer pairs all are targets, some repeatedly.
    targets = targets[jnp.arange(TARGETS, dtype=jnp.int32) % jnp.maximum(valid.sum(dtype=jnp.int32), 1)]
    ends, rewards = belief.features[targets], belief.rewards[targets]
    if space.pairs is None and max_pairs(space) > CANDIDATES:
        offered = subset(key_offered, space, max(k, CANDIDATES))
    else:
        offered = space
    information = prior_information(hparams, belief, space, k)
    criterion = epig_criterion(ends[:, 0] - ends[:, 1], rewards[:, 0] - rewards[:, 1])
    best, _ = greedy(criterion, belief.features, belief.rewards, offered, information, k)
    return best_first(best)


def eubo(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Pairs whose better response is expected to be best: the largest E max(r_i, r_j).

    Gain: E max(u_i, u_j) = (u_i + u_j) / 2 + E|d| / 2, d ~ N(m, q) the margin under the Laplace posterior with A0 of
    `prior_information`, so E|d| = m erf(m / sqrt(2 q)) + sqrt(2 q / pi) exp(-m^2 / (2 q)). Utilities u are rewards less
    their mean over the prompt (within) or over the responses of the space, a level that no label can tell.
    Source: Lin et al. (arXiv 2203.11382), analytic; here with a linear last layer in place of a Gaussian process.
    """

    def score(middle: Array, margin: Array, q: Array) -> Array:
        root = jnp.sqrt(jnp.maximum(q, jnp.finfo(q.dtype).tiny))
        z = margin / root
        spread = margin * jax.lax.erf(z * 0.5**0.5) + (2 / jnp.pi) ** 0.5 * root * jnp.exp(-jnp.square(z) / 2)
        return middle + spread / 2

    def pair(a: Numbers, b: Numbers) -> Array:
        return score((a.reward + b.reward) / 2, a.reward - b.reward, square_sum(a.y - b.y))

    def tile(rows: Numbers, columns: Numbers) -> Array:
        a, b = rows.reward[:, None], columns.reward[None, :]
        return score((a + b) / 2, a - b, distances(rows.y, columns.y))

    return top_of_laplace(hparams, belief, space, k, lambda numbers: Scorer(numbers, pair, tile))
