"""Fit reward heads to labelled pairs: Newton steps for linear heads, AdamW with early stopping for the others.

Responses are scored once, however many pairs they are in, and padding is left out where the device can branch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.scipy.linalg
import optax  # type: ignore[import-untyped]

from jarm.base import Fit, FitInfo, HParams, JarmError, Labelled, RewardHead, Status
from jarm.losses import bradley_terry
from jarm.types import Array, Bool, Float, Int, Params, PRNGKey


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """The static part of a fit; numbers that can be swept are in `HParams`.

    Attributes:
      members: K, heads in the ensemble.
      ensemble: how members differ: `init` (keys of their own) or `bootstrap` (and Poisson(1) weights of the pairs).
      steps: most steps of Adam.
      holdout: share of the labelled pairs that a member holds out to stop on; 0 takes all `steps`.
      check_every: steps between two looks at the held-out pairs.
      patience: looks without a better held-out loss before stopping.
      batch_size: pairs a step, drawn with replacement; None takes all pairs every step.
      newton_steps: most Newton steps of a linear head.
      batching: members by `vmap`, one by one by `map`, or `auto`: as measured to be faster on the backend.
    """

    members: int = 1
    ensemble: str = "init"
    steps: int = 1000
    holdout: float = 0.2
    check_every: int = 10
    patience: int = 5
    batch_size: int | None = None
    newton_steps: int = 30
    batching: str = "auto"


class _Pairs(NamedTuple):
    """Pairs of one member: rows of its embedding table, and weights that are 0 for all but its own part."""

    first: Int[Array, "L"]
    second: Int[Array, "L"]
    label: Float[Array, "L"]
    train: Float[Array, "L"]
    valid: Float[Array, "L"]


def make_fit(head: RewardHead, config: FitConfig = FitConfig()) -> Fit:
    """Make the function that fits `config.members` heads to labelled pairs.

    Minimises the weighted mean of `bradley_terry(r_first - r_second, label)`; the result is a pure function that can be
    jitted, scanned, mapped and vmapped, and that compiles once for a capacity.

    Args:
      head: the head to fit.
      config: the static part of the fit.

    Returns:
      `fit(key, hparams, embeddings, labelled, warm=None) -> (params, info)`, params with a leading axis K.

    Raises:
      JarmError: a setting that makes no sense.
    """
    _check(head, config)
    member = _newton if head.linear else _adam
    in_turn = config.batching == "map" or (config.batching == "auto" and jax.default_backend() == "cpu")

    @jax.jit
    def fit(
        key: PRNGKey,
        hparams: HParams,
        embeddings: Float[Array, "N d"],
        labelled: Labelled,
        warm: Params | None = None,
    ) -> tuple[Params, FitInfo]:
        hparams = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), hparams)

        def one(key_and_warm: tuple[PRNGKey, Params | None]) -> tuple[Params, FitInfo]:
            key, warm = key_and_warm
            init_key, part_key, weight_key, step_key = jax.random.split(key, 4)
            start = head.init(init_key, embeddings.shape[1]) if warm is None else warm
            rows, pairs = _table(labelled, len(embeddings))
            weight = plain = jnp.where(labelled.mask, labelled.weight, 0.0)
            if config.ensemble == "bootstrap":
                weight = weight * jax.random.poisson(weight_key, 1.0, weight.shape).astype(jnp.float32)
            held = labelled.mask if head.linear else _hold_out(part_key, labelled.mask, config.holdout)
            train = jnp.where(held & (not head.linear), 0.0, weight)
            part = _Pairs(*pairs, labelled.label, train, jnp.where(held, plain, 0.0))
            return member(head, config, step_key, hparams, embeddings[rows], part, start)

        keys = jax.random.split(key, config.members)
        params, info = jax.lax.map(one, (keys, warm)) if in_turn else jax.vmap(one)((keys, warm))
        return params, info._replace(status=info.status.max())

    return fit


def _check(head: RewardHead, config: FitConfig) -> None:
    for name, value, allowed in (
        ("ensemble", config.ensemble, ("init", "bootstrap")),
        ("batching", config.batching, ("auto", "vmap", "map")),
    ):
        if value not in allowed:
            raise JarmError(f"FitConfig.{name} is '{value}': choose one of {', '.join(allowed)}.")
    for name in ("members", "steps", "check_every", "patience", "newton_steps"):
        if getattr(config, name) < 1:
            raise JarmError(f"FitConfig.{name} is {getattr(config, name)}: give 1 or more.")
    if not 0.0 <= config.holdout < 1.0:
        raise JarmError(f"FitConfig.holdout is {config.holdout}: give a share in [0, 1).")
    if config.batch_size is not None and config.batch_size < 1:
        raise JarmError(f"FitConfig.batch_size is {config.batch_size}: give 1 or more, or None for all pairs.")
    if head.linear and config.members > 1 and config.ensemble == "init":
        raise JarmError("All members of a linear ensemble would be equal: set FitConfig.ensemble to 'bootstrap'.")


def _table(labelled: Labelled, n: int) -> tuple[Int[Array, "U"], tuple[Int[Array, "L"], Int[Array, "L"]]]:
    """Rows of the embeddings that the pairs need, each once, and the pairs as indices into those rows."""
    ends = jnp.stack([labelled.first, labelled.second])
    if n <= ends.size:
        return jnp.arange(n), (labelled.first, labelled.second)
    rows, places = jnp.unique(ends, return_inverse=True, size=ends.size, fill_value=0)
    return rows, tuple(places.reshape(ends.shape))


def _hold_out(key: PRNGKey, mask: Bool[Array, "L"], share: float) -> Bool[Array, "L"]:
    """A random `share` of the labelled pairs, rounded to a whole number of them."""
    order = jnp.argsort(jnp.where(mask, jax.random.uniform(key, mask.shape), 2.0))
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype))
    return rank < jnp.round(share * mask.sum())


def _mean(losses: Float[Array, "L"], weight: Float[Array, "L"]) -> Float[Array, ""]:
    return jnp.vdot(losses, weight) / jnp.maximum(weight.sum(), jnp.finfo(jnp.float32).tiny)


def _select(condition: Bool[Array, ""], yes: Params, no: Params) -> Params:
    return jax.tree.map(functools.partial(jnp.where, condition), yes, no)


class _State(NamedTuple):
    params: Params
    opt: optax.OptState
    best: Params
    best_nll: Float[Array, ""]
    stale: Int[Array, ""]
    steps: Int[Array, ""]
    finite: Bool[Array, ""]


def _adam(
    head: RewardHead,
    config: FitConfig,
    key: PRNGKey,
    hparams: HParams,
    rows: Float[Array, "U d"],
    pairs: _Pairs,
    start: Params,
) -> tuple[Params, FitInfo]:
    optimiser = optax.adamw(hparams.learning_rate, weight_decay=hparams.weight_decay)
    cumulated = jnp.cumsum(pairs.train > 0)

    def nll(params: Params, weight: Float[Array, "L"]) -> Float[Array, ""]:
        rewards = head.rewards(params, rows)
        return _mean(bradley_terry(rewards[pairs.first] - rewards[pairs.second], pairs.label), weight)

    def batch_nll(params: Params, key: PRNGKey, size: int) -> Float[Array, ""]:
        draw = jax.random.randint(key, (size,), 0, jnp.maximum(cumulated[-1], 1))
        at = jnp.searchsorted(cumulated, draw, side="right").clip(max=len(cumulated) - 1)
        rewards = head.rewards(params, rows[jnp.concatenate([pairs.first[at], pairs.second[at]])])
        losses = bradley_terry(rewards[: len(at)] - rewards[len(at) :], pairs.label[at])
        return jnp.vdot(losses, pairs.train[at]) / jnp.maximum(pairs.train.sum() / cumulated[-1] * len(at), 1e-30)

    def step(i: Int[Array, ""], state: _State) -> _State:
        if config.batch_size is None:
            gradient = jax.grad(nll)(state.params, pairs.train)
        else:
            gradient = jax.grad(batch_nll)(state.params, jax.random.fold_in(key, state.steps), config.batch_size)
        updates, opt = optimiser.update(gradient, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        return state._replace(params=params, opt=opt, steps=state.steps + 1)

    def block(state: _State) -> _State:
        take = jnp.minimum(config.check_every, config.steps - state.steps)
        state = jax.lax.fori_loop(0, take, step, state)
        if config.holdout == 0.0:
            return state
        now = nll(state.params, pairs.valid)
        better = now < state.best_nll
        return state._replace(
            best=_select(better, state.params, state.best),
            best_nll=jnp.where(better, now, state.best_nll),
            stale=jnp.where(better, 0, state.stale + 1),
            finite=state.finite & jnp.isfinite(now),
        )

    def going(state: _State) -> Bool[Array, ""]:
        return (state.steps < config.steps) & (state.stale < config.patience) & state.finite

    zero = jnp.int32(0)
    state = _State(start, optimiser.init(start), start, jnp.float32(jnp.inf), zero, zero, jnp.bool_(True))
    state = jax.lax.while_loop(going, block, state)
    params = state.params if config.holdout == 0.0 else state.best
    train_nll = nll(params, pairs.train)
    ok = state.finite & jnp.isfinite(train_nll)
    return params, FitInfo(
        train_nll=train_nll,
        valid_nll=nll(params, pairs.valid) if config.holdout else jnp.float32(jnp.nan),
        steps=state.steps,
        status=jnp.where(ok, Status.OK, Status.DIVERGED).astype(jnp.int32),
    )


_Inverse: TypeAlias = tuple[Callable[[Array], Array], Callable[[], Array]]


class _NewtonState(NamedTuple):
    weights: Float[Array, "d"]
    objective: Float[Array, ""]
    steps: Int[Array, ""]
    converged: Bool[Array, ""]
    definite: Bool[Array, ""]


def _newton(
    head: RewardHead,
    config: FitConfig,
    key: PRNGKey,
    hparams: HParams,
    rows: Float[Array, "U d"],
    pairs: _Pairs,
    start: Params,
) -> tuple[Params, FitInfo]:
    """Damped Newton steps on `sum weight nll + ridge / 2 |w|^2`; the held-out loss is leave-one-out, approximated.

    Source of the latter: Rad and Maleki, "A scalable estimate of the out-of-sample prediction error via approximate
    leave-one-out cross-validation", JRSS-B 2020.
    """
    del key
    x = rows[pairs.first] - rows[pairs.second]
    inverse = _dual_inverse if len(x) < x.shape[1] else _primal_inverse
    _, unravel = jax.flatten_util.ravel_pytree(start)

    def objective(weights: Float[Array, "d"]) -> Float[Array, ""]:
        losses = bradley_terry(x @ weights, pairs.label)
        return jnp.vdot(losses, pairs.train) + 0.5 * hparams.ridge * jnp.vdot(weights, weights)

    def curvature(weights: Float[Array, "d"]) -> tuple[Float[Array, "L"], Float[Array, "L"]]:
        margin = x @ weights
        first, second = pairs.train * jax.nn.sigmoid(margin), jax.nn.sigmoid(-margin)
        return first - pairs.train * pairs.label, first * second

    def step(state: _NewtonState) -> _NewtonState:
        slope, v = curvature(state.weights)
        gradient = x.T @ slope + hparams.ridge * state.weights
        direction = -inverse(x, v, hparams.ridge)[0](gradient)
        decrease = -jnp.vdot(gradient, direction)
        definite = jnp.isfinite(decrease)

        lengths = 0.5 ** jnp.arange(8, dtype=jnp.float32)
        objectives = jax.vmap(lambda t: objective(state.weights + t * direction))(lengths)
        enough = objectives <= state.objective - 1e-4 * lengths * decrease
        best = jnp.where(enough.any(), jnp.argmax(enough), jnp.argmin(objectives))
        better = definite & (objectives[best] < state.objective)
        return _NewtonState(
            weights=jnp.where(better, state.weights + lengths[best] * direction, state.weights),
            objective=jnp.where(better, objectives[best], state.objective),
            steps=state.steps + 1,
            converged=~better | (decrease <= 1e-7 * jnp.maximum(pairs.train.sum(), 1.0)),
            definite=definite,
        )

    weights = head.weights(start)
    state = _NewtonState(weights, objective(weights), jnp.int32(0), jnp.bool_(False), jnp.bool_(True))
    state = jax.lax.while_loop(lambda s: ~s.converged & (s.steps < config.newton_steps), step, state)

    slope, v = curvature(state.weights)
    margin = x @ state.weights
    leverage = inverse(x, v, hparams.ridge)[1]()
    left_out = margin + leverage * slope / jnp.maximum(1.0 - v * leverage, 1e-6)
    status = jnp.where(jnp.isfinite(state.objective), Status.OK, Status.DIVERGED)
    return unravel(state.weights), FitInfo(
        train_nll=_mean(bradley_terry(margin, pairs.label), pairs.train),
        valid_nll=_mean(bradley_terry(left_out, pairs.label), pairs.valid),
        steps=state.steps,
        status=jnp.where(state.definite, status, Status.SINGULAR).astype(jnp.int32),
    )


def _primal_inverse(x: Float[Array, "L d"], v: Float[Array, "L"], ridge: Array | float) -> _Inverse:
    """H = x^T diag(v) x + ridge I by Cholesky: the solve with H, and the leverages x_i^T H^-1 x_i."""
    factor = jnp.linalg.cholesky((x.T * v[None, :]) @ x + ridge * jnp.eye(x.shape[1], dtype=x.dtype))

    def solve(g: Float[Array, "d"]) -> Float[Array, "d"]:
        return jax.scipy.linalg.cho_solve((factor, True), g)

    def leverages() -> Float[Array, "L"]:
        return (jax.scipy.linalg.solve_triangular(factor, x.T, lower=True) ** 2).sum(0)

    return solve, leverages


def _dual_inverse(x: Float[Array, "L d"], v: Float[Array, "L"], ridge: Array | float) -> _Inverse:
    """The same by Woodbury's identity, for fewer pairs than dimensions.

    With s = sqrt(v): H^-1 = (I - x^T s B^-1 s x) / ridge, where B = ridge I + s x x^T s is L x L.
    """
    root = jnp.sqrt(v)
    gram = x @ x.T
    scaled = root[:, None] * gram * root[None, :]
    factor = jnp.linalg.cholesky(scaled + ridge * jnp.eye(len(x), dtype=x.dtype))

    def solve(g: Float[Array, "d"]) -> Float[Array, "d"]:
        return (g - x.T @ (root * jax.scipy.linalg.cho_solve((factor, True), root * (x @ g)))) / ridge

    def leverages() -> Float[Array, "L"]:
        half = jax.scipy.linalg.solve_triangular(factor, root[:, None] * gram, lower=True)
        return (jnp.diagonal(gram) - (half**2).sum(0)) / ridge

    return solve, leverages
