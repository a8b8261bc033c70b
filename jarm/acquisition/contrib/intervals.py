"""The rules of `jarm.acquisition.intervals` with the intervals of published code, for comparison."""

from __future__ import annotations

from jarm.acquisition.intervals import delta_quantile, delta_ucb, ids, info_gain, infomax, max_min_lcb, rucb
from jarm.core.base import Belief, HParams, PairSpace, Rule, Selection
from jarm.core.types import PRNGKey


def as_published(rule: Rule) -> Rule:
    """The same rule with published intervals: half-width beta (s_i + s_j), s_i the sd over members of R_i by itself."""

    def published(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
        return rule(key, hparams, belief, space, k, marginal=True)  # type: ignore[call-arg]

    name = rule.__name__  # type: ignore[attr-defined]
    published.__name__ = published.__qualname__ = f"{name}_marginal"
    published.__doc__ = f"""`{name}` with published intervals, beta (s_i + s_j): for comparison, not for use.

    s_i is the sd over members of R_i by itself; `{name}` takes the sd of R_i - R_j. Gain: as of `{name}`.
    """
    return published


infomax_marginal = as_published(infomax)
delta_ucb_marginal = as_published(delta_ucb)
delta_quantile_marginal = as_published(delta_quantile)
max_min_lcb_marginal = as_published(max_min_lcb)
info_gain_marginal = as_published(info_gain)
rucb_marginal = as_published(rucb)
ids_marginal = as_published(ids)
