"""Rules by the margin m = r_i - r_j of a pair alone, and the random rule."""

from __future__ import annotations

import jax.numpy as jnp

from jarm.core.base import Belief, HParams, PairSpace, Selection
from jarm.core.types import PRNGKey
from jarm.design.top import random_pairs, top_pairs


def random(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Pairs drawn uniformly without replacement: the baseline of every rule.

    Gain: 0.
    """
    return random_pairs(key, space, k)


def then_random(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Random pairs after a first batch that was chosen (`--first`), where `random` draws its first batch, too.

    Gain: 0. It tells what the first batch alone is worth.
    """
    return random_pairs(key, space, k)


def entropy(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Pairs of the most uncertain label: the smallest |m|, the same order as the entropy of sigmoid(m).

    Gain: -|m|. Called level set in the released rules of Shen, Sun, Ton (arXiv 2502.04354).
    """
    return top_pairs(lambda margin, _: -jnp.abs(margin), belief.rewards, None, space, k)


def max_diff(key: PRNGKey, hparams: HParams, belief: Belief, space: PairSpace, k: int) -> Selection:
    """Pairs of the most certain label: the largest |m|.

    Gain: |m|. A baseline of Shen, Sun, Ton (arXiv 2502.04354).
    """
    return top_pairs(lambda margin, _: jnp.abs(margin), belief.rewards, None, space, k)
