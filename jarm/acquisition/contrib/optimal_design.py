"""`greedy_dopt` from other priors."""

from __future__ import annotations

import dataclasses

from jarm.acquisition.optimal_design import greedy_dopt, prior_information
from jarm.core.base import Belief, HParams, PairSpace, Selection
from jarm.core.types import PRNGKey
from jarm.design.criteria import D_OPTIMAL
from jarm.design.greedy import greedy


def greedy_dopt_blind(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """`greedy_dopt` without the labelled pairs: the batch is spread out, but may repeat known information.

    Gain: log(1 + v x^T A^-1 x) in nats, A the prior (`prior_information`, not past-aware) and the batch so far.
    """
    information = prior_information(hparams, belief, space, k, past_aware=False)
    return greedy(D_OPTIMAL, belief.features, belief.rewards, space, information, k)[0]


def adpo(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Active DPO: greedy log det from a ridge and the information of the labelled pairs (`greedy_dopt`, rho = 0).

    Gain: log(1 + v x^T H^-1 x) in nats, H = gamma I + I_lab + batch so far, gamma = c n tr(Ibar)/F (see
    `prior_information`), which scales with the features.

    Source: Kveton et al. (arXiv 2503.01076), with their beta 1 and reference log-ratios 0. They scan a random 256
    candidates per step; here every choice is exact over the space and deterministic.
    """
    return greedy_dopt(key, dataclasses.replace(hparams, prior_mix=0.0), belief, space, k)
