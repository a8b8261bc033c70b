"""D-optimal rules: pairs that add most to log det of the Fisher information of the head's last layer.

Source: Shen, Sun, Ton, Active Reward Modeling (arXiv 2502.04354), and its released rules, here by their closed form:
the gradient of log det(sum_m w_m v_m x_m x_m^T) with respect to w_m at w = 1 is v_m x_m^T M^-1 x_m, M the pool's
information. Those score each pair alone; `greedy_dopt` grows the batch, so that a pair is worth only what the pairs
already in the batch do not tell.
"""

from __future__ import annotations

import jax.numpy as jnp

from jarm.base import Belief, HParams, PairSpace, Selection
from jarm.fisher import fisher_weight, space_information
from jarm.greedy import greedy_log_det
from jarm.linalg import inverse_factor, jitter, worst
from jarm.selection import top_pairs
from jarm.types import Array, Float, PRNGKey


def _one_shot(belief: Belief, space: PairSpace, k: int, metric: Float[Array, "F F"], *, weighted: bool) -> Selection:
    """The k pairs of largest v x^T metric^-1 x (v = 1 where not weighted)."""
    whiten, singular = inverse_factor(jitter(metric))

    def score(margin: Array, distance: Array) -> Array:
        return fisher_weight(margin) * distance if weighted else distance

    best = top_pairs(score, belief.rewards, belief.features, space, k, whiten=whiten)
    return Selection(best.pairs, best.gains, best.valid, worst(best.status, singular))


def xtx(key: PRNGKey, belief: Belief, space: PairSpace, k: int, hparams: HParams) -> Selection:
    """D-optimal as if the labels were real numbers: the largest x^T (sum_pool x x^T)^-1 x.

    Gain: that leverage; over a pool of full rank they sum to F.
    """
    metric, _ = space_information(belief.features, None, space)
    return _one_shot(belief, space, k, metric, weighted=False)


def dopt(key: PRNGKey, belief: Belief, space: PairSpace, k: int, hparams: HParams) -> Selection:
    """The released D-optimal rule: the largest v x^T M^-1 x, M = sum_pool v x x^T, v = p (1 - p).

    Gain: that leverage; over a pool of full rank they sum to F. Each pair is scored alone, so near-copies of one
    good pair are all taken.
    """
    metric, _ = space_information(belief.features, belief.rewards, space)
    return _one_shot(belief, space, k, metric, weighted=True)


def pa_dopt(key: PRNGKey, belief: Belief, space: PairSpace, k: int, hparams: HParams) -> Selection:
    """The released past-aware D-optimal rule: `dopt` with the information of the labelled pairs added to M.

    Gain: v x^T (M + past)^-1 x; the past is recomputed with the current head.
    """
    metric, _ = space_information(belief.features, belief.rewards, space)
    return _one_shot(belief, space, k, metric + belief.past, weighted=True)


def prior_information(
    belief: Belief, space: PairSpace, k: int, hparams: HParams, *, past_aware: bool = True
) -> Float[Array, "F F"]:
    """What a greedy batch starts from: A0 = past + c n [(1 - rho) tr(Ibar)/F I + rho Ibar].

    Ibar is the mean information of a pair of the space, n the labels after this batch, c = `hparams.prior` and
    rho = `hparams.prior_mix`. Scaling by n and by the trace of Ibar makes c a pure number: the weight of the prior
    in units of the information that n average pairs carry. Jittered, so that a rank-deficient shape passes.
    """
    pool, count = space_information(belief.features, belief.rewards, space)
    mean = pool / jnp.maximum(count, 1)
    width = mean.shape[0]
    ridge = jnp.trace(mean) / width * jnp.eye(width, dtype=mean.dtype)
    labels = (belief.labels + k).astype(mean.dtype)
    prior = hparams.prior * labels * ((1 - hparams.prior_mix) * ridge + hparams.prior_mix * mean)
    return jitter(prior + belief.past if past_aware else prior)


def _greedy(key: PRNGKey, belief: Belief, space: PairSpace, k: int, hparams: HParams, *, past_aware: bool) -> Selection:
    prior = prior_information(belief, space, k, hparams, past_aware=past_aware)
    selection, _ = greedy_log_det(belief.features, belief.rewards, space, prior, k)
    return selection


def greedy_dopt(key: PRNGKey, belief: Belief, space: PairSpace, k: int, hparams: HParams) -> Selection:
    """Exact greedy D-optimal batch: each pair adds most to log det of past + prior + batch so far.

    Gain: log(1 + v x^T A^-1 x) in nats, A the information up to the pair. See `prior_information` for the prior
    and `jarm.greedy` for why the choice is exact over every pair of the space.
    """
    return _greedy(key, belief, space, k, hparams, past_aware=True)


def greedy_dopt_blind(key: PRNGKey, belief: Belief, space: PairSpace, k: int, hparams: HParams) -> Selection:
    """`greedy_dopt` that forgets the labelled pairs: the batch is spread out, but may repeat what is known.

    Gain: as `greedy_dopt`, with A0 the prior alone.
    """
    return _greedy(key, belief, space, k, hparams, past_aware=False)
