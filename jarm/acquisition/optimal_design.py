"""Rules of optimal experimental design, on the information of the head's last layer.

Source: Shen, Sun, Ton, Active Reward Modeling (arXiv 2502.04354), and its released rules, here by their closed form:
the gradient of log det(sum_m w_m v_m x_m x_m^T) with respect to w_m at w = 1 is v_m x_m^T M^-1 x_m, M the information
of the candidates. The released rules score each pair alone; `greedy_dopt` grows the batch, so that a pair counts only
for the information it adds to the pairs already in the batch. Rules of other papers differ in the weight (v or 1), the
inverted matrix (candidates or labelled pairs), the update of the batch, and the criterion (log det, or a trace of the
inverse).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jarm.core.base import Belief, HParams, PairSpace, Selection
from jarm.core.linalg import inverse_factor, jitter
from jarm.core.status import Status, worst
from jarm.core.types import Array, Float, PRNGKey
from jarm.design.criteria import D_OPTIMAL, D_UNWEIGHTED, Criterion, a_optimal, v_optimal
from jarm.design.fisher import fisher_weight, pair_information, space_information, within_covariance
from jarm.design.greedy import greedy
from jarm.design.top import best_first, top_pairs


def _one_shot(belief: Belief, space: PairSpace, k: int, metric: Float[Array, "F F"], *, weighted: bool) -> Selection:
    """The k pairs of largest v x^T metric^-1 x (v = 1 where not weighted)."""
    whiten, singular = inverse_factor(jitter(metric))

    def score(margin: Array, distance: Array) -> Array:
        return fisher_weight(margin) * distance if weighted else distance

    best = top_pairs(score, belief.rewards, belief.features, space, k, whiten=whiten)
    return Selection(best.pairs, best.gains, best.valid, worst(best.status, singular))


def xtx(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """D-optimal as if the labels were real numbers: the largest x^T (sum x x^T)^-1 x.

    Gain: that leverage; leverages of candidates of full rank sum to F.
    """
    metric, _ = space_information(belief.features, None, space)
    return _one_shot(belief, space, k, metric, weighted=False)


def dopt(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """The released D-optimal rule: the largest v x^T M^-1 x, M = sum v x x^T, v = p (1 - p).

    Gain: that leverage; leverages of candidates of full rank sum to F. Each pair is scored alone, so the rule takes all
    near-copies of a good pair.
    """
    metric, _ = space_information(belief.features, belief.rewards, space)
    return _one_shot(belief, space, k, metric, weighted=True)


def pa_dopt(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """The released past-aware D-optimal rule: `dopt` with the information of the labelled pairs added to M.

    Gain: v x^T (M + I_lab)^-1 x, I_lab the labelled information under the current head.
    """
    metric, _ = space_information(belief.features, belief.rewards, space)
    return _one_shot(belief, space, k, metric + belief.labelled_information, weighted=True)


def prior_information(
    hparams: HParams, belief: Belief, space: PairSpace, k: int, *, past_aware: bool = True
) -> Float[Array, "F F"]:
    """Information at the start of a greedy batch: A0 = I_lab + c n [(1 - rho) tr(Ibar)/F I + rho Ibar].

    I_lab is the labelled information (0 where not past-aware), Ibar the mean information of a pair of the space, n the
    number of labels after this batch, c = `hparams.prior_weight` and rho = `hparams.prior_mix`. Scaling by n and by the
    trace of Ibar makes c a pure number: the weight of the prior in units of the information of n average pairs. Where
    the head has a prior of its own, w ~ N(0, I / `belief.prior_precision`), A0 = I_lab + that precision times I.
    Jittered, so that a rank-deficient shape passes.
    """
    if belief.prior_precision is None:
        prior = _shaped(hparams, _mean_information(belief, space), belief, k)
    else:
        prior = belief.prior_precision * jnp.eye(belief.features.shape[1], dtype=jnp.float32)
    return jitter(prior + belief.labelled_information if past_aware else prior)


def _mean_information(belief: Belief, space: PairSpace, *, weighted: bool = True) -> Float[Array, "F F"]:
    """Ibar, the mean over the space of v x x^T (v = 1 where not weighted)."""
    total, count = space_information(belief.features, belief.rewards if weighted else None, space)
    return total / jnp.maximum(count, 1)


def _shaped(hparams: HParams, mean: Float[Array, "F F"], belief: Belief, k: int) -> Float[Array, "F F"]:
    """c n [(1 - rho) tr(mean)/F I + rho mean], n the number of labels after this batch."""
    width = mean.shape[0]
    ridge = jnp.trace(mean) / width * jnp.eye(width, dtype=mean.dtype)
    labels = (belief.num_labelled + k).astype(mean.dtype)
    return hparams.prior_weight * labels * ((1 - hparams.prior_mix) * ridge + hparams.prior_mix * mean)


def greedy_dopt(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Exact greedy D-optimal batch: each pair adds most to log det of I_lab + prior + batch so far.

    Gain: log(1 + v x^T A^-1 x) in nats, A the information up to the pair. See `prior_information` for the prior and
    `jarm.design.greedy` for why the choice is exact over every pair of the space.
    """
    information = prior_information(hparams, belief, space, k)
    return greedy(D_OPTIMAL, belief.features, belief.rewards, space, information, k)[0]


def _gram(hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Float[Array, "F F"]:
    """V = sum x x^T over the labelled pairs + c n tr(Gbar)/F I, Gbar the mean of x x^T over the space."""
    labelled = (jnp.arange(belief.labelled_features.shape[0], dtype=jnp.int32) < belief.num_labelled).astype(
        belief.labelled_features.dtype
    )
    ends = jnp.where(labelled[:, None, None] > 0, belief.labelled_features, 0)
    ridge = _shaped(
        dataclasses.replace(hparams, prior_mix=0.0), _mean_information(belief, space, weighted=False), belief, k
    )
    return jitter(pair_information(ends[:, 0], ends[:, 1], labelled) + ridge)


def apo(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Active Preference Optimization: the largest x^T V^-1 x, V the Gram matrix of labelled pairs, each pair alone.

    V = sum_labelled x x^T + c n tr(Gbar)/F I, Gbar the mean of x x^T over the space, n the number of labels after this
    batch and c = `hparams.prior_weight`. No Fisher weight: labels count as real numbers, and rewards are unused.
    Gain: x^T V^-1 x.

    Source: Das et al. (arXiv 2402.10500). Their code adds 1e-5 I whatever the scale of the features; here the ridge
    scales with the features and with n, as the sum does. Their embeddings swap chosen and rejected texts, which turns x
    into -x and changes no score.
    """
    whiten, singular = inverse_factor(_gram(hparams, belief, space, k))
    rewards = jnp.zeros_like(belief.rewards)
    best = top_pairs(lambda _, distance: distance, rewards, belief.features, space, k, whiten=whiten)
    idle = jnp.where((best.valid & (best.gains <= 0)).any(), Status.UNINFORMATIVE, Status.OK)
    return dataclasses.replace(best, status=worst(best.status, idle, singular))


def greedy_apo(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """`apo` with V updated after every pair: exact greedy log det without Fisher weights, the same as MaxDet.

    Gain: log(1 + x^T V^-1 x) in nats, V with the batch so far: with the linear kernel of x and the ridge as its noise,
    the determinantal rule MaxDet of Holzmueller et al. (arXiv 2203.09410), the largest posterior variance.
    """
    information = _gram(hparams, belief, space, k)
    return greedy(D_UNWEIGHTED, belief.features, jnp.zeros_like(belief.rewards), space, information, k)[0]


def _smallest_trace(hparams: HParams, criterion: Criterion, belief: Belief, space: PairSpace, k: int) -> Selection:
    information = prior_information(hparams, belief, space, k)
    return best_first(greedy(criterion, belief.features, belief.rewards, space, information, k)[0])


def _about(mean: Float[Array, "F F"]) -> Criterion:
    """The criterion that a pair lowers tr(A^-1 mean): `v_optimal`, for F targets whose outer products add up to it."""
    values, vectors = jnp.linalg.eigh(mean)
    targets = jnp.sqrt(jnp.maximum(values, 0))[:, None] * vectors.T
    return v_optimal(targets, jnp.ones(len(targets), jnp.float32))


def a_opt(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """A-optimal greedy batch: each pair lowers tr A^-1, the total variance of the head's weights, the most.

    Gain: that fall, v x^T A^-2 x / (1 + v x^T A^-1 x), A as in `greedy_dopt`. It may rise as the batch grows, so the
    batch is listed by gain. Unlike log det it depends on the coordinates of the features.
    Source: the classical criterion of optimal design (Pukelsheim, Optimal Design of Experiments, 1993).
    """
    return _smallest_trace(hparams, a_optimal(belief.features.shape[1]), belief, space, k)


def bait(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """BAIT: each pair lowers tr(A^-1 Ibar), the variance of the margins of the candidates weighted by v, the most.

    Gain: that fall, v x^T A^-1 Ibar A^-1 x / (1 + v x^T A^-1 x), Ibar the mean information of a pair of the space and A
    as in `greedy_dopt`. It may rise as the batch grows, so the batch is listed by gain. This is the V-optimal (or
    I-optimal) rule with the candidates as its targets.

    Source: Ash et al. (arXiv 2106.09675), whose prior is lambda I: `prior_mix` 0. They pick 2 k pairs forward and prune
    k of them; here the forward picks are exact over the space, without pruning.
    """
    return _smallest_trace(hparams, _about(_mean_information(belief, space)), belief, space, k)


def v_opt(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """V-optimal greedy batch for rankings within prompts: each pair lowers tr(A^-1 G), their variance, the most.

    G is the mean of z z^T over the eligible responses, z = phi - its prompt's mean (`within_covariance`): tr(A^-1 G) is
    the mean variance of a reward less that of its prompt, whichever pairs are on offer. A loop that scores some of the
    responses of a round gives that of all of them (`Belief.within_covariance`).

    Gain: its fall, v x^T A^-1 G A^-1 x / (1 + v x^T A^-1 x), A as in `greedy_dopt`. It may rise as the batch grows, so
    the batch is listed by gain. `bait` has the pairs on offer as its targets, weighted by v.
    Source: the classical criterion of optimal design (Box and Draper, JASA 1959), with these targets.
    """
    covariance = belief.within_covariance
    if covariance is None:
        covariance = within_covariance(belief.features, space)
    return _smallest_trace(hparams, _about(covariance), belief, space, k)
