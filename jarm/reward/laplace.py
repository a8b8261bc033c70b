"""Laplace heads: Bradley-Terry regression with a Gaussian prior, and the Gaussian posterior around its mode.

The model is reward = w . e with w ~ N(0, s2 I). At the mode of w the labels have the Hessian sum v x x^T, x the
difference of a pair's embeddings and v = p (1 - p), so that the posterior is about N(mode, (I / s2 + sum v x x^T)^-1).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jarm.core.base import FitInfo
from jarm.core.status import Status
from jarm.core.types import Array, Float, Int, Params, PRNGKey
from jarm.reward.losses import bradley_terry
from jarm.reward.newton import factorised, newton
from jarm.reward.training import FitParts, FitProblem, weighted_mean

EVIDENCE_GRID = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Prior variances that evidence chooses from, times `HParams.prior_variance`."""


class Posterior(NamedTuple):
    """The Laplace posterior of a linear head.

    Attributes:
      mode: `[d]` the weights of largest posterior density, also the mean.
      log_evidence: scalar, log probability of the labels under the prior, in nats, approximated by that Gaussian.
      margin: `[L]` margins of the pairs at the mode, in logits.
      margin_left_out: `[L]` the same with each pair left out of the fit, approximated.
      steps: scalar int32, Newton steps taken.
      status: scalar int32 `Status`.
    """

    mode: Float[Array, "d"]
    log_evidence: Float[Array, ""]
    margin: Float[Array, "L"]
    margin_left_out: Float[Array, "L"]
    steps: Int[Array, ""]
    status: Int[Array, ""]


def posterior(
    x: Float[Array, "L d"],
    label: Float[Array, "L"],
    weight: Float[Array, "L"],
    prior_variance: Float[Array, ""],
    start: Float[Array, "d"] | None = None,
    *,
    steps: int = 60,
) -> Posterior:
    """The posterior of w ~ N(0, s2 I) given labelled pairs.

    log evidence = log likelihood - |w|^2 / (2 s2) - 1/2 log det(I + s2 sum v x x^T), at the mode w.

    Args:
      x: `[L, d]`, the embedding of the first response minus that of the second.
      label: `[L]`, probability in [0, 1] that the first is preferred.
      weight: `[L]`, weight of the pair; 0 leaves it out.
      prior_variance: s2, in squared logits per squared unit of an embedding.
      start: `[d]` weights from which Newton's method starts, by default 0.
      steps: maximum number of its steps.

    Returns:
      The posterior; its status is as that of `newton`.

    Source: MacKay, "The evidence framework applied to classification networks", Neural Computation 1992.

    Example:
      One label in one dimension: the mode solves w / s2 = 1 - sigmoid(w).

      >>> import jax.numpy as jnp
      >>> found = posterior(jnp.ones((1, 1)), jnp.ones(1), jnp.ones(1), jnp.float32(4.0))
      >>> round(float(found.mode[0]), 2), round(float(found.log_evidence), 2)
      (1.04, -0.72)
    """
    start = jnp.zeros(x.shape[1], x.dtype) if start is None else start
    found = newton(x, label, weight, 1 / prior_variance, start, steps=steps)
    log_posterior = -jnp.vdot(bradley_terry(found.margin, label), weight)
    log_posterior -= 0.5 * jnp.vdot(found.weights, found.weights) / prior_variance
    return Posterior(
        mode=found.weights,
        log_evidence=log_posterior - 0.5 * found.log_det,
        margin=found.margin,
        margin_left_out=found.margin_left_out,
        steps=found.steps,
        status=found.status,
    )


def draw(
    key: PRNGKey,
    x: Float[Array, "L d"],
    weight: Float[Array, "L"],
    margin: Float[Array, "L"],
    prior_variance: Float[Array, ""],
) -> Float[Array, "d"]:
    """A draw of N(0, Sigma), Sigma = (I / s2 + sum v x x^T)^-1: posterior weights less their mode.

    It is Sigma (u / s2 - sum sqrt(v) e x) with u ~ N(0, s2 I) and e ~ N(0, 1) for each pair, which is a Newton
    direction, so that the smaller of the d x d and the L x L system is solved (Matheron's rule).

    Args:
      key: chance of the draw.
      x, weight, prior_variance: as for `posterior`.
      margin: `[L]` margins at the mode.
    """
    root = jnp.sqrt(weight * jax.nn.sigmoid(margin) * jax.nn.sigmoid(-margin))
    key_prior, key_pairs = jax.random.split(key)
    prior = jnp.sqrt(prior_variance) * jax.random.normal(key_prior, x.shape[1:], x.dtype)
    noise = root * jax.random.normal(key_pairs, x.shape[:1], x.dtype)
    return factorised(x, root**2, 1 / prior_variance).direction(prior, x @ prior, noise)


def covariance(
    x: Float[Array, "L d"], weight: Float[Array, "L"], margin: Float[Array, "L"], prior_variance: Float[Array, ""]
) -> Float[Array, "d d"]:
    """Sigma, the covariance of the posterior; arguments as those of `draw`."""
    hessian = factorised(x, weight * jax.nn.sigmoid(margin) * jax.nn.sigmoid(-margin), 1 / prior_variance)
    # Of a unit vector over the ridge, the Newton direction is a column of -Sigma.
    units = prior_variance * jnp.eye(x.shape[1], dtype=x.dtype)
    return -jax.vmap(hessian.direction)(units, units @ x.T, jnp.zeros((x.shape[1], len(x)), x.dtype))


def fit_by_laplace(parts: FitParts, key: PRNGKey, problem: FitProblem) -> tuple[Params, FitInfo]:
    """Members that are draws of the posterior, shifted so that their mean is the mode, and thus their mean reward its.

    Differences of members are those of independent draws, and so are variances over members. A single member is the
    mode. The report is that of the mode, for each member.
    """
    hparams, starts, embeddings, pairs, _ = problem
    x, members = embeddings[pairs.first] - embeddings[pairs.second], parts.config.members
    start = jax.vmap(parts.head.weights)(starts).mean(axis=0)

    def one(variance: Float[Array, ""]) -> Posterior:
        return posterior(x, pairs.label, pairs.weight, variance, start, steps=parts.config.newton_steps)

    variance = jnp.asarray(hparams.prior_variance)
    # Hessians at the precision of their type: on some accelerators a plain product has a third of its digits.
    with jax.default_matmul_precision("highest"):
        if parts.config.evidence:
            variances = variance * jnp.asarray(EVIDENCE_GRID, jnp.float32)
            each = parts.over_members(one, variances)
            usable = jnp.isfinite(each.log_evidence) & (each.status == Status.OK)  # it is too large off the mode
            best = jnp.argmax(jnp.where(usable, each.log_evidence, -jnp.inf))
            variance, found = variances[best], jax.tree.map(lambda leaf: leaf[best], each)
        else:
            found = one(variance)
        weights = jnp.broadcast_to(found.mode, (members, len(found.mode)))
        if members > 1:
            deviations = jax.vmap(lambda key: draw(key, x, pairs.weight, found.margin, variance))(
                jax.random.split(key, members)
            )
            weights += deviations - deviations.mean(axis=0, keepdims=True)
    train_nll = weighted_mean(bradley_terry(found.margin, pairs.label), pairs.weight)
    valid_nll = weighted_mean(bradley_terry(found.margin_left_out, pairs.label), pairs.weight)
    params = {"out": {"kernel": weights[:, :, None]}, "prior_precision": jnp.broadcast_to(1 / variance, members)}
    info = FitInfo(train_nll, valid_nll, found.steps, found.status)
    return params, jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, members), info)
