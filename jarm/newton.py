"""Ridge Bradley-Terry regression by Newton's method: exact fits of linear heads, in a few steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import jax.scipy.linalg

from jarm.base import Status
from jarm.losses import bradley_terry
from jarm.types import Array, Bool, Float, Int


class NewtonFit(NamedTuple):
    """Weights, the margins of the pairs under them and with each pair left out (approximated), steps, `Status`."""

    weights: Float[Array, "d"]
    margin: Float[Array, "L"]
    margin_left_out: Float[Array, "L"]
    steps: Int[Array, ""]
    status: Int[Array, ""]


class _State(NamedTuple):
    weights: Float[Array, "d"]
    objective: Float[Array, ""]
    steps: Int[Array, ""]
    done: Bool[Array, ""]
    definite: Bool[Array, ""]


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
    halved until the objective falls enough. The margin with a pair left out is one Newton step away:
    `m + h g / (1 - h v)`, with g and v the derivatives of the pair's loss and h = x^T H^-1 x.

    Args:
      x: `[L, d]`, the embedding of the first response minus that of the second.
      label: `[L]`, probability in [0, 1] that the first is preferred.
      weight: `[L]`, weight of the pair; 0 leaves it out.
      ridge: precision of the prior on each weight.
      start: `[d]` weights to start from.
      steps: most steps.

    Returns:
      The fit; `SINGULAR` if a Hessian was not positive definite in float32, or if the steps did not lead to a minimum,
      as for separable pairs without a ridge; `DIVERGED` if the objective was not finite to begin with.

    Source: Rad and Maleki, "A scalable estimate of the out-of-sample prediction error via approximate leave-one-out
    cross-validation", JRSS-B 2020, for the margins left out.
    """
    factorise = _dual if len(x) < x.shape[1] else _primal

    def objective(weights: Float[Array, "d"]) -> Float[Array, ""]:
        return jnp.vdot(bradley_terry(x @ weights, label), weight) + 0.5 * ridge * jnp.vdot(weights, weights)

    def derivatives(weights: Float[Array, "d"]) -> tuple[Float[Array, "L"], Float[Array, "L"]]:
        p, q = jax.nn.sigmoid(x @ weights), jax.nn.sigmoid(-(x @ weights))
        return weight * ((1.0 - label) * p - label * q), weight * p * q

    def step(state: _State) -> _State:
        slope, curvature = derivatives(state.weights)
        gradient = x.T @ slope + ridge * state.weights
        direction = -factorise(x, curvature, ridge)[0](gradient)
        decrease = -jnp.vdot(gradient, direction)
        lengths = 0.5 ** jnp.arange(8, dtype=jnp.float32)
        objectives = jax.vmap(lambda t: objective(state.weights + t * direction))(lengths)
        longest = jnp.argmax(objectives < state.objective - 1e-4 * lengths * decrease)
        better = objectives[longest] < state.objective
        return _State(
            weights=jnp.where(better, state.weights + lengths[longest] * direction, state.weights),
            objective=jnp.where(better, objectives[longest], state.objective),
            steps=state.steps + 1,
            # Below this the objective no longer moves in float32.
            done=~better | (decrease <= 1e-7 * state.objective),
            definite=jnp.isfinite(decrease),
        )

    state = _State(start, objective(start), jnp.int32(0), jnp.bool_(False), jnp.bool_(True))
    state = jax.lax.while_loop(lambda s: ~s.done & (s.steps < steps), step, state)

    margin = x @ state.weights
    slope, curvature = derivatives(state.weights)
    leverage = factorise(x, curvature, ridge)[1]()
    status = jnp.where(jnp.isfinite(state.objective), Status.OK, Status.DIVERGED)
    return NewtonFit(
        weights=state.weights,
        margin=margin,
        margin_left_out=margin + leverage * slope / jnp.maximum(1.0 - curvature * leverage, 1e-6),
        steps=state.steps,
        status=jnp.where(state.done & state.definite, status, Status.SINGULAR).astype(jnp.int32),
    )


_Factorised: TypeAlias = tuple[Callable[[Array], Array], Callable[[], Array]]


def _primal(x: Float[Array, "L d"], curvature: Float[Array, "L"], ridge: Float[Array, ""]) -> _Factorised:
    """With H = x^T diag(curvature) x + ridge I: the function that solves with it, and one for all x_l^T H^-1 x_l."""
    factor = jnp.linalg.cholesky((x.T * curvature[None, :]) @ x + ridge * jnp.eye(x.shape[1], dtype=x.dtype))

    def solve(g: Float[Array, "d"]) -> Float[Array, "d"]:
        return jax.scipy.linalg.cho_solve((factor, True), g)

    def leverages() -> Float[Array, "L"]:
        return (jax.scipy.linalg.solve_triangular(factor, x.T, lower=True) ** 2).sum(0)

    return solve, leverages


def _dual(x: Float[Array, "L d"], curvature: Float[Array, "L"], ridge: Float[Array, ""]) -> _Factorised:
    """The same by Woodbury: H^-1 = (I - x^T s B^-1 s x) / ridge, s = sqrt(curvature), B = ridge I + s x x^T s."""
    root, gram = jnp.sqrt(curvature), x @ x.T
    factor = jnp.linalg.cholesky(root[:, None] * gram * root[None, :] + ridge * jnp.eye(len(x), dtype=x.dtype))

    def solve(g: Float[Array, "d"]) -> Float[Array, "d"]:
        return (g - x.T @ (root * jax.scipy.linalg.cho_solve((factor, True), root * (x @ g)))) / ridge

    def leverages() -> Float[Array, "L"]:
        half = jax.scipy.linalg.solve_triangular(factor, root[:, None] * gram, lower=True)
        return (jnp.diagonal(gram) - (half**2).sum(0)) / ridge

    return solve, leverages
