"""Linear heads, exactly: ridge Bradley-Terry regression by Newton's method, in a few steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.scipy.linalg

from jarm.core.base import FitInfo
from jarm.core.status import Status
from jarm.core.types import Array, Bool, Float, Int, Params, PRNGKey
from jarm.reward.losses import bradley_terry
from jarm.reward.training import FitParts, FitProblem, weighted_mean


def fit_by_newton(parts: FitParts, key: PRNGKey, problem: FitProblem) -> tuple[Params, FitInfo]:
    """Linear members, each at the minimum of its weighted loss plus `ridge / 2 |w|^2`; nothing is drawn."""
    del key
    hparams, starts, embeddings, pairs, weights = problem
    x, label, ends = embeddings[pairs.first] - embeddings[pairs.second], pairs.label, 1
    if parts.config.loss == "classification":  # each response against zero, with the label of its place
        x = jnp.concatenate([embeddings[pairs.first], embeddings[pairs.second]])
        label, ends = jnp.concatenate([label, 1 - label]), 2

    def one(xs: tuple[Params, Float[Array, "L"]]) -> tuple[Params, FitInfo]:
        start, weight = xs[0], jnp.tile(xs[1], ends)
        ridge, (_, unravel) = jnp.asarray(hparams.ridge), jax.flatten_util.ravel_pytree(start)
        found = newton(x, label, weight, ridge, parts.head.weights(start), steps=parts.config.newton_steps)
        train_nll = ends * weighted_mean(bradley_terry(found.margin, label), weight)
        valid_nll = ends * weighted_mean(bradley_terry(found.margin_left_out, label), jnp.tile(pairs.weight, ends))
        return unravel(found.weights), FitInfo(train_nll, valid_nll, found.steps, found.status)

    # Hessians at the precision of their type: on some accelerators a plain product has a third of its digits.
    with jax.default_matmul_precision("highest"):
        return parts.over_members(one, (starts, weights))


class NewtonFit(NamedTuple):
    """A fit of one linear head.

    Attributes:
      weights: `[d]`.
      margin: `[L]` margins of the pairs, in logits.
      margin_left_out: `[L]` margin of each pair with this pair left out of the fit, approximated.
      log_det: scalar, log det of the Hessian over the ridge, log det(I + sum v x x^T / ridge).
      steps: scalar int32, Newton steps taken.
      status: scalar int32 `Status`.
    """

    weights: Float[Array, "d"]
    margin: Float[Array, "L"]
    margin_left_out: Float[Array, "L"]
    log_det: Float[Array, ""]
    steps: Int[Array, ""]
    status: Int[Array, ""]


class _State(NamedTuple):
    """Weights, steps taken, the relative decrement before the last step, and whether steps got stuck or restarted."""

    weights: Float[Array, "d"]
    steps: Int[Array, ""]
    decrement: Float[Array, ""]
    stuck: Bool[Array, ""]
    restarted: Bool[Array, ""]


_HALVINGS = (*range(0, 4), *range(4, 32, 3))  # where pairs are saturated, a whole step leads far off
_SMALL = 1e-5  # decrement of a minimum in float32, relative to the criterion
_SMALLEST = 1e-7  # decrement at which the criterion no longer moves in float32


def newton(
    x: Float[Array, "L d"],
    label: Float[Array, "L"],
    weight: Float[Array, "L"],
    ridge: Float[Array, ""],
    start: Float[Array, "d"],
    *,
    steps: int = 30,
) -> NewtonFit:
    """Minimise `sum_l weight_l bradley_terry(x_l . w, label_l) + ridge / 2 |w|^2` by damped Newton steps.

    A step solves with the Hessian exactly, by Cholesky of the smaller of its d x d form and its L x L dual, and is
    halved until the criterion falls enough, or its fall is rounding. At a minimum the Newton decrement `g^T H^-1 g` is
    small relative to the criterion. Steps restart from zero where the start is worse than zero, or where they get stuck
    before a minimum. The margin with a pair left out is one Newton step away: `m + h g / (1 - h v)`, with g and v the
    derivatives of the pair's loss and h = x^T H^-1 x.

    Args:
      x: `[L, d]`, the embedding of the first response minus that of the second.
      label: `[L]`, probability in [0, 1] that the first is preferred.
      weight: `[L]`, weight of the pair; 0 leaves it out.
      ridge: precision of the prior on each weight.
      start: `[d]` weights to start from.
      steps: maximum number of steps.

    Returns:
      The fit. Its status is `SINGULAR` where the steps did not lead to a minimum: separable pairs without a ridge, or
      a Hessian that is not positive definite in float32. It is `DIVERGED` where the criterion at the start is NaN.

    Source: Rad and Maleki, "A scalable estimate of the out-of-sample prediction error via approximate leave-one-out
    cross-validation", JRSS-B 2020, for the margins left out.
    """
    lengths = jnp.asarray([*(0.5**n for n in _HALVINGS), 0.0], jnp.float32)

    def along(weights: Float[Array, "d"], direction: Float[Array, "d"]) -> Float[Array, "_"]:
        """The criterion after steps of all lengths along a direction; the last length is 0."""
        margin, change = x @ weights, x @ direction

        def at(length: Float[Array, ""]) -> Float[Array, ""]:
            there = weights + length * direction
            return jnp.vdot(bradley_terry(margin + length * change, label), weight) + 0.5 * ridge * there @ there

        return jax.vmap(at)(lengths)

    def step(state: _State) -> _State:
        margin = x @ state.weights
        slope, curvature = _derivatives(margin, label, weight)
        curvature = jnp.maximum(curvature, 1e-20 * jnp.abs(slope))  # it may underflow where the slope does not
        direction = factorised(x, curvature, ridge).direction(state.weights, margin, slope)
        change = x @ direction
        # The decrement in two forms, equal but for rounding: where they differ, this is no Newton step.
        decrease = -jnp.vdot(slope, change) - ridge * jnp.vdot(state.weights, direction)
        squared = jnp.vdot(curvature, change**2) + ridge * jnp.vdot(direction, direction)
        criteria = along(state.weights, jnp.where(jnp.isfinite(decrease), direction, 0.0))
        decrement = jnp.maximum(jnp.abs(decrease), squared) / jnp.maximum(criteria[-1], 1e-30)
        enough = criteria < criteria[-1] - 1e-4 * lengths * decrease
        length = jnp.where(enough.any(), lengths[jnp.argmax(enough)], 0.0)
        # Where the criterion falls by less than its rounding, the whole step is right, and the last one.
        stuck, near = length == 0.0, decrement <= _SMALL
        length = jnp.where(stuck & near, 1.0, length)
        again = stuck & ~near & ~state.restarted & jnp.isfinite(criteria[-1])
        moved = jnp.where(length > 0.0, state.weights + length * direction, state.weights)
        return _State(
            weights=jnp.where(again, 0.0, moved),
            steps=state.steps + 1,
            decrement=jnp.where(again, jnp.inf, decrement),
            stuck=stuck & ~again,
            restarted=state.restarted | again,
        )

    at_start = along(start, jnp.zeros_like(start))[-1]
    worse = at_start > jnp.log(jnp.float32(2.0)) * weight.sum()
    state = _State(jnp.where(worse, 0.0, start), jnp.int32(0), jnp.float32(jnp.inf), jnp.bool_(False), worse)
    state = jax.lax.while_loop(lambda s: (s.decrement > _SMALLEST) & ~s.stuck & (s.steps < steps), step, state)

    margin = x @ state.weights
    slope, curvature = _derivatives(margin, label, weight)
    hessian = factorised(x, curvature, ridge)
    leverage = hessian.leverages()
    failure = jnp.where(jnp.isnan(at_start), Status.DIVERGED, Status.SINGULAR)
    return NewtonFit(
        weights=state.weights,
        margin=margin,
        margin_left_out=margin + leverage * slope / jnp.maximum(1.0 - curvature * leverage, 1e-6),
        log_det=hessian.log_det(),
        steps=state.steps,
        status=jnp.where(state.decrement <= _SMALL, Status.OK, failure).astype(jnp.int32),
    )


def _derivatives(
    margin: Float[Array, "L"], label: Float[Array, "L"], weight: Float[Array, "L"]
) -> tuple[Float[Array, "L"], Float[Array, "L"]]:
    p, q = jax.nn.sigmoid(margin), jax.nn.sigmoid(-margin)
    return weight * ((1.0 - label) * p - label * q), weight * p * q


class Factorised(NamedTuple):
    """Functions of H = x^T diag(curvature) x + ridge I.

    Attributes:
      direction: `(weights[d], margin[L], slope[L]) -> -H^-1 (x^T slope + ridge weights)`, the Newton direction, where
        margin = x weights.
      leverages: `() -> [L]`, x_l^T H^-1 x_l.
      log_det: `() -> scalar`, log det(H / ridge).
    """

    direction: Callable[[Float[Array, "d"], Float[Array, "L"], Float[Array, "L"]], Float[Array, "d"]]
    leverages: Callable[[], Float[Array, "L"]]
    log_det: Callable[[], Float[Array, ""]]


def factorised(x: Float[Array, "L d"], curvature: Float[Array, "L"], ridge: Float[Array, ""]) -> Factorised:
    """H by the Cholesky factor of the smaller of its d x d form and its L x L dual."""
    return (_dual if len(x) < x.shape[1] else _primal)(x, curvature, ridge)


def _log_det(factor: Float[Array, "n n"], ridge: Float[Array, ""]) -> Float[Array, ""]:
    return 2 * jnp.log(jnp.diagonal(factor)).sum() - len(factor) * jnp.log(ridge)


def _primal(x: Float[Array, "L d"], curvature: Float[Array, "L"], ridge: Float[Array, ""]) -> Factorised:
    factor = jnp.linalg.cholesky((x.T * curvature[None, :]) @ x + ridge * jnp.eye(x.shape[1], dtype=x.dtype))

    def direction(weights: Float[Array, "d"], margin: Float[Array, "L"], slope: Float[Array, "L"]) -> Float[Array, "d"]:
        return -jax.scipy.linalg.cho_solve((factor, True), x.T @ slope + ridge * weights)

    def leverages() -> Float[Array, "L"]:
        return (jax.scipy.linalg.solve_triangular(factor, x.T, lower=True) ** 2).sum(0)

    return Factorised(direction, leverages, lambda: _log_det(factor, ridge))


def _dual(x: Float[Array, "L d"], curvature: Float[Array, "L"], ridge: Float[Array, ""]) -> Factorised:
    """The same by way of B = ridge I + s x x^T s, s = sqrt(curvature).

    A step ends at the weights x^T s B^-1 (s m - slope / s): unlike Woodbury, H^-1 = (I - x^T s B^-1 s x) / ridge, this
    form does not divide by the ridge.
    """
    root, gram = jnp.sqrt(curvature), x @ x.T
    factor = jnp.linalg.cholesky(root[:, None] * gram * root[None, :] + ridge * jnp.eye(len(x), dtype=x.dtype))

    def direction(weights: Float[Array, "d"], margin: Float[Array, "L"], slope: Float[Array, "L"]) -> Float[Array, "d"]:
        target = root * margin - slope / jnp.maximum(root, 1e-30)
        return x.T @ (root * jax.scipy.linalg.cho_solve((factor, True), target)) - weights

    def leverages() -> Float[Array, "L"]:
        half = jax.scipy.linalg.solve_triangular(factor, root[:, None] * gram, lower=True)
        return (jnp.diagonal(gram) - (half**2).sum(0)) / ridge

    return Factorised(direction, leverages, lambda: _log_det(factor, ridge))
