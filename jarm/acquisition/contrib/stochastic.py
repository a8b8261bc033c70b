"""Random forms of the D-optimal rules."""

from __future__ import annotations

import jax.numpy as jnp

from jarm.acquisition.information import top_of_laplace
from jarm.acquisition.optimal_design import greedy_dopt
from jarm.acquisition.stochastic import mixed, perturbed
from jarm.core.base import Belief, HParams, PairSpace, Selection
from jarm.core.types import PRNGKey
from jarm.design.criteria import D_OPTIMAL, Numbers
from jarm.design.scorer import Scorer


def softmax_dopt(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Pairs drawn with chances proportional to exp(log det gain / temperature): a diverse batch without a greedy one.

    Gain: log(1 + v x^T A0^-1 x) + temperature g nats, A0 of `prior_information`, g the Gumbel noise of the pair.
    At temperature 1 chances are proportional to 1 + v x^T A0^-1 x; at 0 the batch is the k best first steps of
    `greedy_dopt`. The softmax rule of Kirsch et al. (2106.12059) with the D-optimal gain of Shen et al. (2502.04354).
    """

    def scorer(numbers: Numbers) -> Scorer:
        return perturbed(D_OPTIMAL.scorer(numbers, jnp.zeros(0, jnp.float32), gains=True), key, hparams.temperature)

    return top_of_laplace(hparams, belief, space, k, scorer)


_mixed_dopt = mixed(greedy_dopt)


def epsilon_greedy_dopt(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """`greedy_dopt` with a share epsilon of the batch drawn at random.

    Gain: as of `greedy_dopt`; 0 for a random pair. See `jarm.acquisition.stochastic.mixed`, which mixes any rule.
    """
    return _mixed_dopt(key, hparams, belief, space, k)
