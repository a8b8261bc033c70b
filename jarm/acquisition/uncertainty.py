"""Rules that look at the margin m = r_i - r_j of a pair and nothing else, and the rule that looks at nothing."""

from __future__ import annotations

import jax.numpy as jnp

from jarm.core.base import Belief, HParams, PairSpace, Selection
from jarm.core.types import PRNGKey
from jarm.design.top import random_pairs, top_pairs


def random(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Pairs drawn uniformly without replacement: what every rule has to beat.

    Gain: 0.
    """
    return random_pairs(key, space, k)


def entropy(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Pairs the head is least sure of: the smallest |m|, the same order as the entropy of sigmoid(m).

    Gain: -|m|. Known in the released rules as the level set.
    """
    return top_pairs(lambda margin, _: -jnp.abs(margin), belief.rewards, None, space, k)


def max_diff(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Pairs the head is surest of: the largest |m|.

    Gain: |m|.
    """
    return top_pairs(lambda margin, _: jnp.abs(margin), belief.rewards, None, space, k)
