"""Losses of one labelled pair, in nats: elementwise functions of rewards or of their difference, in logits.

A label in [0, 1] is the probability that the first response is preferred. A loss of one's own has the signature of
`bradley_terry` or `classification`, and is used by a fit of one's own (`make_loop(config, fit)`), which may close over
further columns of a table, gathered at the ends of the pairs (`table.column(name).reshape(-1)[labelled.first]`).
"""

from __future__ import annotations

import jax

from jarm.core.types import Array, Float


def smooth(label: Float[Array, "*batch"], amount: Array | float) -> Float[Array, "*batch"]:
    """Label smoothing: `(1 - amount) label + amount / 2`."""
    return (1.0 - amount) * label + 0.5 * amount


def bradley_terry(margin: Float[Array, "*batch"], label: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Negative log-likelihood: `label softplus(-m) + (1 - label) softplus(m)`, m the margin.

    Value and gradient, `sigmoid(m) - label`, keep their relative precision at any margin, of either sign.

    Args:
      margin: `r_first - r_second`, in logits.
      label: probability in [0, 1] that the first response is preferred; may be soft.

    Returns:
      The loss, elementwise, in nats.
    """
    return label * jax.nn.softplus(-margin) + (1.0 - label) * jax.nn.softplus(margin)


def classification(
    reward_first: Float[Array, "*batch"],
    reward_second: Float[Array, "*batch"],
    label: Float[Array, "*batch"],
) -> Float[Array, "*batch"]:
    """Classify each response by itself as preferred or not: an upper bound of `bradley_terry`.

    `bradley_terry(r1, label) + bradley_terry(r2, 1 - label)`: no reward is compared with that of its partner.

    Args:
      reward_first, reward_second: rewards, read as logits of "preferred".
      label: probability in [0, 1] that the first response is preferred.

    Returns:
      The loss, elementwise, in nats.

    Source: Sun, Shen, Ton, "Rethinking reward modeling in preference-based large language model alignment", 2025.
    """
    return bradley_terry(reward_first, label) + bradley_terry(reward_second, 1.0 - label)
