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


def _mean(losses: Float[Array, "L"], weight: Float[Array, "L"]) -> Float[Array, ""]:
    """Weighted mean; 0 where nothing weighs anything."""
    return jnp.vdot(losses, weight) / jnp.maximum(weight.sum(), jnp.finfo(jnp.float32).tiny)


class _Pairs(NamedTuple):
    """Weighted pairs, as indices into some rows of embeddings."""

    first: Int[Array, "L"]
    second: Int[Array, "L"]
    label: Float[Array, "L"]
    weight: Float[Array, "L"]

    def take(self, at: Int[Array, "B"]) -> _Pairs:
        return _Pairs(*(x[at] for x in self))

    def nll(self, rewards: Float[Array, "U"]) -> Float[Array, ""]:
        """Weighted mean loss, given the rewards of the rows."""
        return _mean(bradley_terry(rewards[self.first] - rewards[self.second], self.label), self.weight)

    def ends(self) -> tuple[Int[Array, "2*L"], _Pairs]:
        """Both ends of every pair, and the pairs as indices into them."""
        places = jnp.arange(2 * len(self.first), dtype=jnp.int32).reshape(2, -1)
        return jnp.concatenate([self.first, self.second]), self._replace(first=places[0], second=places[1])

    def responses(self, n: int) -> tuple[Int[Array, "U"], Int[Array, ""], _Pairs]:
        """Which of n responses are in a pair that weighs something, each once; how many; the pairs as indices."""
        used = self.weight > 0
        ends = jnp.where(used[None, :], jnp.stack([self.first, self.second]), n)
        size = min(n, ends.size)
        # The n that stands for every other end sorts last, and needs a place.
        ids, places = jnp.unique(ends, return_inverse=True, size=size + 1, fill_value=n)
        first, second = jnp.where(used[None, :], places.reshape(ends.shape), 0)
        return ids[:size].clip(max=n - 1), (ids < n).sum(), self._replace(first=first, second=second)


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
    in_turn = config.batching == "map" or (config.batching == "auto" and jax.default_backend() == "cpu")
    member = (
        functools.partial(_newton, head, config) if head.linear else functools.partial(_adam, head, config, in_turn)
    )

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
            key_start, key_weight, key_member = jax.random.split(key, 3)
            start = head.init(key_start, embeddings.shape[1]) if warm is None else warm
            weight = jnp.where(labelled.mask, labelled.weight, 0.0)
            pairs = _Pairs(labelled.first, labelled.second, labelled.label, weight)
            if config.ensemble == "bootstrap":
                counts = jax.random.poisson(key_weight, 1.0, weight.shape)
                weight = weight * counts.astype(jnp.float32)
            return member(key_member, start, hparams, embeddings, pairs, weight, labelled.mask)

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
    in_turn: bool,
    key: PRNGKey,
    start: Params,
    hparams: HParams,
    embeddings: Float[Array, "N d"],
    pairs: _Pairs,
    weight: Float[Array, "L"],
    mask: Bool[Array, "L"],
) -> tuple[Params, FitInfo]:
    """One member by AdamW: hold out its own part of the pairs, descend on the rest."""
    key_part, key_steps = jax.random.split(key)
    n, capacity = len(embeddings), len(mask)
    # A random order of the pairs: those held out come first, the unlabelled last.
    order = jnp.argsort(jnp.where(mask, jax.random.uniform(key_part, mask.shape), 2.0))
    most = round(config.holdout * capacity)
    count = mask.sum(dtype=jnp.int32)
    held = jnp.minimum(jnp.round(config.holdout * count).astype(jnp.int32), most)
    ends, valid = pairs.take(order[:most]).ends()
    valid = valid._replace(weight=jnp.where(jnp.arange(most) < held, valid.weight, 0.0))
    valid_rows = embeddings[ends]
    train = pairs._replace(weight=weight.at[order].multiply(jnp.arange(capacity) >= held))

    def valid_nll(params: Params) -> Float[Array, ""]:
        return valid.nll(head.rewards(params, valid_rows))

    if config.batch_size is None:
        # Members under vmap share the rows of all labelled pairs, so that these are read once for all members.
        ids, used, indexed = (train if in_turn else pairs).responses(n)
        indexed = indexed._replace(weight=train.weight)

        def descend(size: int) -> _State:
            rows = embeddings[ids[:size]]
            return _descend(
                config, key_steps, hparams, start, lambda q, _: indexed.nll(head.rewards(q, rows)), valid_nll
            )

        sizes = _sizes(len(ids)) if in_turn else (len(ids),)
        branches = [functools.partial(descend, size) for size in sizes]
        state = jax.lax.switch(jnp.searchsorted(jnp.asarray(sizes), used), branches)
    else:

        def batch_nll(params: Params, key: PRNGKey) -> Float[Array, ""]:
            draw = jax.random.randint(key, (config.batch_size or 0,), held, jnp.maximum(count, held + 1))
            ends, batch = train.take(order[draw]).ends()
            return batch.nll(head.rewards(params, embeddings[ends]))

        state = _descend(config, key_steps, hparams, start, batch_nll, valid_nll)

    params = state.best if config.holdout else state.params
    train_nll = _chunked_nll(head, params, embeddings, train)
    ok = state.finite & jnp.isfinite(train_nll)
    return params, FitInfo(
        train_nll=train_nll,
        valid_nll=state.best_nll if config.holdout else jnp.float32(jnp.nan),
        steps=state.steps,
        status=jnp.where(ok, Status.OK, Status.DIVERGED).astype(jnp.int32),
    )


def _sizes(capacity: int) -> tuple[int, ...]:
    """Numbers of rows to compile for; a fit takes the least that holds its rows."""
    return tuple(-(-capacity * part // 4) for part in (1, 2, 3, 4)) if capacity >= 128 else (capacity,)


def _descend(
    config: FitConfig,
    key: PRNGKey,
    hparams: HParams,
    start: Params,
    loss: Callable[[Params, PRNGKey], Float[Array, ""]],
    valid_nll: Callable[[Params], Float[Array, ""]],
) -> _State:
    """AdamW steps on `loss` until `valid_nll` has not improved for a while."""
    optimiser = optax.adamw(hparams.learning_rate, weight_decay=hparams.weight_decay)

    # Kernels are descended on as [out, in]: XLA on CPU forms the gradient of a first layer [in, out] at a fifth of the
    # speed of its transpose, and Adam, elementwise, does not care.
    def flip(params: Params) -> Params:
        return jax.tree.map(lambda leaf: leaf.T if leaf.ndim == 2 else leaf, params)

    def step(_: Int[Array, ""], state: _State) -> _State:
        key_step = jax.random.fold_in(key, state.steps)
        gradient = jax.grad(lambda params: loss(flip(params), key_step))(state.params)
        updates, opt = optimiser.update(gradient, state.opt, state.params)
        return state._replace(params=optax.apply_updates(state.params, updates), opt=opt, steps=state.steps + 1)

    def block(state: _State) -> _State:
        state = jax.lax.fori_loop(0, jnp.minimum(config.check_every, config.steps - state.steps), step, state)
        if not config.holdout:
            return state
        now = valid_nll(flip(state.params))
        better = now < state.best_nll
        return state._replace(
            best=jax.tree.map(functools.partial(jnp.where, better), state.params, state.best),
            best_nll=jnp.where(better, now, state.best_nll),
            stale=jnp.where(better, 0, state.stale + 1),
            finite=jnp.isfinite(now),
        )

    def going(state: _State) -> Bool[Array, ""]:
        return (state.steps < config.steps) & (state.stale < config.patience) & state.finite

    first, zero = flip(start), jnp.int32(0)
    state = _State(first, optimiser.init(first), first, jnp.float32(jnp.inf), zero, zero, jnp.bool_(True))
    state = jax.lax.while_loop(going, block, state)
    return state._replace(params=flip(state.params), best=flip(state.best))


def _chunked_nll(head: RewardHead, params: Params, embeddings: Float[Array, "N d"], pairs: _Pairs) -> Float[Array, ""]:
    """Weighted mean loss of pairs, of which a few are looked up at a time."""

    def one(pair: _Pairs) -> Float[Array, ""]:
        margin = head.rewards(params, embeddings[pair.first]) - head.rewards(params, embeddings[pair.second])
        return bradley_terry(margin, pair.label)

    return _mean(jax.lax.map(one, pairs, batch_size=256), pairs.weight)


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
    start: Params,
    hparams: HParams,
    embeddings: Float[Array, "N d"],
    pairs: _Pairs,
    weight: Float[Array, "L"],
    mask: Bool[Array, "L"],
) -> tuple[Params, FitInfo]:
    """Damped Newton steps on `sum weight nll + ridge / 2 |w|^2`; the held-out loss is leave-one-out, approximated.

    Source of the latter: Rad and Maleki, "A scalable estimate of the out-of-sample prediction error via approximate
    leave-one-out cross-validation", JRSS-B 2020.
    """
    del key, mask
    x = embeddings[pairs.first] - embeddings[pairs.second]
    inverse = _dual_inverse if len(x) < x.shape[1] else _primal_inverse
    _, unravel = jax.flatten_util.ravel_pytree(start)

    def objective(weights: Float[Array, "d"]) -> Float[Array, ""]:
        losses = bradley_terry(x @ weights, pairs.label)
        return jnp.vdot(losses, weight) + 0.5 * hparams.ridge * jnp.vdot(weights, weights)

    def derivatives(weights: Float[Array, "d"]) -> tuple[Float[Array, "L"], Float[Array, "L"]]:
        """First and second derivative of every pair's loss."""
        margin = x @ weights
        p, q = jax.nn.sigmoid(margin), jax.nn.sigmoid(-margin)
        return weight * ((1.0 - pairs.label) * p - pairs.label * q), weight * p * q

    def step(state: _NewtonState) -> _NewtonState:
        slope, curvature = derivatives(state.weights)
        gradient = x.T @ slope + hparams.ridge * state.weights
        solve, _ = inverse(x, curvature, hparams.ridge)
        direction = -solve(gradient)
        decrease = -jnp.vdot(gradient, direction)
        lengths = 0.5 ** jnp.arange(8, dtype=jnp.float32)
        objectives = jax.vmap(lambda t: objective(state.weights + t * direction))(lengths)
        best = jnp.argmax(objectives < state.objective - 1e-4 * lengths * decrease)
        better = objectives[best] < state.objective
        return _NewtonState(
            weights=jnp.where(better, state.weights + lengths[best] * direction, state.weights),
            objective=jnp.where(better, objectives[best], state.objective),
            steps=state.steps + 1,
            converged=~better | (decrease <= 1e-7 * jnp.maximum(weight.sum(), 1.0)),
            definite=jnp.isfinite(decrease),
        )

    first = head.weights(start)
    state = _NewtonState(first, objective(first), jnp.int32(0), jnp.bool_(False), jnp.bool_(True))
    state = jax.lax.while_loop(lambda s: ~s.converged & (s.steps < config.newton_steps), step, state)

    margin = x @ state.weights
    slope, curvature = derivatives(state.weights)
    _, leverages = inverse(x, curvature, hparams.ridge)
    leverage = leverages()
    left_out = margin + leverage * slope / jnp.maximum(1.0 - curvature * leverage, 1e-6)
    status = jnp.where(jnp.isfinite(state.objective), Status.OK, Status.DIVERGED)
    return unravel(state.weights), FitInfo(
        train_nll=_mean(bradley_terry(margin, pairs.label), weight),
        valid_nll=_mean(bradley_terry(left_out, pairs.label), pairs.weight),
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
