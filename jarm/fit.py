"""Fit reward heads to labelled pairs: Newton's method for linear heads, early-stopped AdamW for the others.

A response is scored once, however many pairs it is in, and padding costs little where the device can branch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

from jarm.base import Fit, FitInfo, HParams, JarmError, Labelled, RewardHead, Status
from jarm.losses import bradley_terry
from jarm.newton import newton
from jarm.types import Array, Bool, Float, Int, Params, PRNGKey


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """The static part of a fit; numbers that can be swept are in `HParams`.

    An MLP is stopped early: `folds` heads each train without their own part of the labelled pairs, all in step, until
    the mean loss of what they hold out stops falling; one head then takes as many steps on all pairs. With one fold
    there is no second fit, and the best head seen is kept. One part of 50 labels is too few pairs to stop on; two
    halves cost twice as much and serve almost as well as knowing the answer (`benchmarks/README.md`).

    Attributes:
      members: K, heads in the ensemble.
      ensemble: how members differ: `init` (keys of their own) or `bootstrap` (and Poisson(1) weights of the pairs).
      steps: most steps of Adam.
      holdout: share of the labelled pairs in a part, rounded to one in a whole number; 0 takes all `steps`.
      folds: number of parts held out, by a head each.
      check_every: steps between two looks at the held-out pairs.
      patience: looks without a lower held-out loss before stopping.
      batch_size: pairs a step, drawn with replacement in proportion to their weight; None takes all pairs every step.
      newton_steps: most Newton steps of a linear head.
      batching: heads by `vmap`, one by one by `map`, or `auto`: as measured to be faster on the backend.
    """

    members: int = 1
    ensemble: str = "init"
    steps: int = 1000
    holdout: float = 0.5
    folds: int = 2
    check_every: int = 5
    patience: int = 5
    batch_size: int | None = None
    newton_steps: int = 30
    batching: str = "auto"

    def __post_init__(self) -> None:
        for name, allowed in (("ensemble", ("init", "bootstrap")), ("batching", ("auto", "vmap", "map"))):
            if getattr(self, name) not in allowed:
                raise JarmError(f"FitConfig.{name} is '{getattr(self, name)}': choose one of {', '.join(allowed)}.")
        for name in ("members", "steps", "folds", "check_every", "patience", "newton_steps"):
            if getattr(self, name) < 1:
                raise JarmError(f"FitConfig.{name} is {getattr(self, name)}: give 1 or more.")
        if self.batch_size is not None and self.batch_size < 1:
            raise JarmError(f"FitConfig.batch_size is {self.batch_size}: give 1 or more, or None for all pairs.")
        if not 0.0 <= self.holdout <= 0.5:
            raise JarmError(f"FitConfig.holdout is {self.holdout}: give a share between 0 and 0.5.")
        if self.holdout and self.folds > self.parts:
            raise JarmError(
                f"FitConfig.folds is {self.folds}, but there are only {self.parts} parts of {self.holdout} of the "
                f"pairs: set it to {self.parts} or less."
            )

    @property
    def parts(self) -> int:
        """Parts that the pairs are dealt into, of which `folds` are held out."""
        return round(1 / self.holdout) if self.holdout else 1


class _Pairs(NamedTuple):
    """Weighted pairs, as indices into some rows of embeddings."""

    first: Int[Array, "L"]
    second: Int[Array, "L"]
    label: Float[Array, "L"]
    weight: Float[Array, "L"]

    def nll(self, rewards: Float[Array, "U"]) -> Float[Array, ""]:
        """Weighted mean loss, given the rewards of the rows."""
        return _mean(bradley_terry(rewards[self.first] - rewards[self.second], self.label), self.weight)

    def take(self, at: Int[Array, "B"]) -> tuple[Int[Array, "2*B"], _Pairs]:
        """Some of the pairs: the responses at their ends, and the pairs as indices into these."""
        places = jnp.arange(2 * len(at), dtype=jnp.int32).reshape(2, -1)
        ends = jnp.concatenate([self.first[at], self.second[at]])
        return ends, _Pairs(places[0], places[1], self.label[at], self.weight[at])

    def compact(self, n: int, most: int) -> tuple[Int[Array, "U"], Int[Array, ""], _Pairs]:
        """The responses, of n, in pairs that weigh something, each once; how many, `most` at most; the pairs so."""
        used = self.weight > 0
        ends = jnp.where(used[None, :], jnp.stack([self.first, self.second]), n)
        # All other ends are n, which sorts last and needs a place.
        size = min(n, most)
        ids, places = jnp.unique(ends, return_inverse=True, size=size + 1, fill_value=n)
        first, second = jnp.where(used[None, :], places.reshape(ends.shape), 0)
        return ids[:size].clip(max=n - 1), (ids < n).sum(), self._replace(first=first, second=second)


def _mean(losses: Float[Array, "L"], weight: Float[Array, "L"]) -> Float[Array, ""]:
    """Weighted mean; 0 where nothing weighs anything."""
    return jnp.vdot(losses, weight) / jnp.maximum(weight.sum(), jnp.finfo(jnp.float32).tiny)


def make_fit(head: RewardHead, config: FitConfig = FitConfig()) -> Fit:
    """Make the function that fits `config.members` heads to labelled pairs.

    It minimises the weighted mean of `bradley_terry(r_first - r_second, label)` early-stopped, with decoupled weight
    decay; or, for a linear head, the weighted sum with `ridge / 2 |w|^2` added, exactly. `FitInfo.valid_nll` is the
    held-out loss at the number of steps taken, the leave-one-out loss of a linear head, or NaN if nothing is held out.

    Args:
      head: the head to fit.
      config: the static part of the fit.

    Returns:
      `fit(key, hparams, embeddings, labelled, warm=None) -> (params, info)`, params with a leading axis K. It is pure:
      jit, scan, map and vmap it as you like. A warm start has seen the pairs that it is about to hold out.

    Raises:
      JarmError: an ensemble of linear heads that would all be equal.
    """
    if head.linear and config.members > 1 and config.ensemble == "init":
        raise JarmError("All members of a linear ensemble would be equal: set FitConfig.ensemble to 'bootstrap'.")
    in_turn = config.batching == "map" or (config.batching == "auto" and jax.default_backend() == "cpu")
    member = _linear if head.linear else _adam

    @jax.jit
    def fit(
        key: PRNGKey,
        hparams: HParams,
        embeddings: Float[Array, "N d"],
        labelled: Labelled,
        warm: Params | None = None,
    ) -> tuple[Params, FitInfo]:
        hparams = jax.tree.map(lambda number: jnp.asarray(number, jnp.float32), hparams)
        weight = jnp.where(labelled.mask, labelled.weight, 0.0)
        pairs = _Pairs(labelled.first, labelled.second, labelled.label, weight)

        def one(key_and_warm: tuple[PRNGKey, Params | None]) -> tuple[Params, FitInfo]:
            key, warm = key_and_warm
            key_start, key_weight, key_member = jax.random.split(key, 3)
            start = head.init(key_start, embeddings.shape[1]) if warm is None else warm
            own = pairs
            if config.ensemble == "bootstrap":
                counts = jax.random.poisson(key_weight, 1.0, weight.shape).astype(jnp.float32)
                own = pairs._replace(weight=weight * counts)
            return member(head, config, in_turn, key_member, start, hparams, embeddings, pairs, own)

        params, info = _over(in_turn, one, (jax.random.split(key, config.members), warm))
        return params, info._replace(status=info.status.max())

    return fit


def _over(in_turn: bool, f: Callable[[Any], Any], xs: Any) -> Any:
    return jax.lax.map(f, xs) if in_turn else jax.vmap(f)(xs)


def _linear(
    head: RewardHead,
    config: FitConfig,
    in_turn: bool,
    key: PRNGKey,
    start: Params,
    hparams: HParams,
    embeddings: Float[Array, "N d"],
    pairs: _Pairs,
    own: _Pairs,
) -> tuple[Params, FitInfo]:
    """One linear member: what it weighs is in `own`, what it is judged by in `pairs`."""
    del in_turn, key
    x = embeddings[own.first] - embeddings[own.second]
    found = newton(x, own.label, own.weight, jnp.asarray(hparams.ridge), head.weights(start), steps=config.newton_steps)
    _, unravel = jax.flatten_util.ravel_pytree(start)
    return unravel(found.weights), FitInfo(
        train_nll=_mean(bradley_terry(found.margin, own.label), own.weight),
        valid_nll=_mean(bradley_terry(found.margin_left_out, own.label), pairs.weight),
        steps=found.steps,
        status=found.status,
    )


_Descent: TypeAlias = tuple[Float[Array, "W"], optax.OptState]
"""Where a descent stands: the parameters as one vector, which compiles faster than many, and the optimiser."""


class _Descend(NamedTuple):
    """AdamW on the loss of some pairs, as functions of where it stands."""

    start: _Descent
    steps: Callable[[PRNGKey, _Descent, _Pairs, Array, Array | int, Array | int], _Descent]
    nll: Callable[[_Descent, _Pairs, Array], Float[Array, ""]]
    params: Callable[[_Descent], Params]


def _make_descend(head: RewardHead, config: FitConfig, hparams: HParams, start: Params) -> _Descend:
    optimiser = optax.adamw(hparams.learning_rate, weight_decay=hparams.weight_decay)

    # Kernels are descended on as [out, in]: XLA on CPU forms the gradient of a wide first layer as [in, out] at a fifth
    # of that speed, and Adam, elementwise, does not mind.
    def flip(params: Params) -> Params:
        return jax.tree.map(lambda leaf: leaf.T if leaf.ndim == 2 else leaf, params)

    vector, unravel = jax.flatten_util.ravel_pytree(flip(start))

    def params(descent: _Descent) -> Params:
        return flip(unravel(descent[0]))

    def nll(descent: _Descent, pairs: _Pairs, rows: Float[Array, "U d"]) -> Float[Array, ""]:
        return pairs.nll(head.rewards(params(descent), rows))

    def minibatch(key: PRNGKey, pairs: _Pairs, size: int) -> tuple[_Pairs, Int[Array, "_"]]:
        total = jnp.cumsum(pairs.weight)
        at = jnp.searchsorted(total, total[-1] * jax.random.uniform(key, (size,)), side="right")
        ends, drawn = pairs.take(at.clip(max=len(total) - 1))
        return drawn._replace(weight=jnp.ones(size)), ends

    def steps(
        key: PRNGKey,
        descent: _Descent,
        pairs: _Pairs,
        rows: Float[Array, "U d"],
        first: Int[Array, ""] | int,
        last: Int[Array, ""] | int,
    ) -> _Descent:
        def step(i: Int[Array, ""], descent: _Descent) -> _Descent:
            vector, opt = descent
            seen, seen_rows = pairs, rows
            if config.batch_size is not None:
                seen, ends = minibatch(jax.random.fold_in(key, i), pairs, config.batch_size)
                seen_rows = rows[ends]
            gradient = jax.grad(lambda vector: nll((vector, opt), seen, seen_rows))(vector)
            updates, opt = optimiser.update(gradient, opt, vector)
            return optax.apply_updates(vector, updates), opt

        return jax.lax.fori_loop(first, last, step, descent)

    return _Descend((vector, optimiser.init(vector)), steps, nll, params)


class _Search(NamedTuple):
    """Where all heads stand, after how many steps, and what was best so far."""

    heads: _Descent
    steps: Int[Array, ""]
    best: _Descent
    best_nll: Float[Array, ""]
    best_steps: Int[Array, ""]
    finite: Bool[Array, ""]


def _search(
    config: FitConfig,
    in_turn: bool,
    descend: _Descend,
    key: PRNGKey,
    train: tuple[_Pairs, Float[Array, "F U d"] | None],
    valid: tuple[_Pairs, Float[Array, "F V d"]],
    shared: Float[Array, "U d"] | None,
) -> _Search:
    """Descend with a head for every fold, until the mean loss of all that they hold out stops falling."""
    weights = valid[0].weight.sum(axis=1)
    keys = jax.random.split(key, config.folds)

    def look(search: _Search) -> _Search:
        last = jnp.minimum(search.steps + config.check_every, config.steps)

        def advance(xs: Any) -> tuple[_Descent, Float[Array, ""]]:
            key, head, (pairs, rows), valid = xs
            head = descend.steps(key, head, pairs, rows if shared is None else shared, search.steps, last)
            return head, descend.nll(head, *valid)

        heads, losses = _over(in_turn, advance, (keys, search.heads, train, valid))
        nll = _mean(losses, weights)
        better = nll < search.best_nll
        return _Search(
            heads=heads,
            steps=last,
            best=jax.tree.map(functools.partial(jnp.where, better), heads, search.best),
            best_nll=jnp.where(better, nll, search.best_nll),
            best_steps=jnp.where(better, last, search.best_steps),
            finite=jnp.isfinite(nll),
        )

    def going(search: _Search) -> Bool[Array, ""]:
        patient = search.steps - search.best_steps < config.check_every * config.patience
        return patient & (search.steps < config.steps) & search.finite

    heads = jax.tree.map(lambda leaf: jnp.stack([leaf] * config.folds), descend.start)
    nll = _mean(_over(in_turn, lambda xs: descend.nll(xs[0], *xs[1]), (heads, valid)), weights)
    search = _Search(heads, jnp.int32(0), heads, nll, jnp.int32(0), jnp.isfinite(nll))
    return jax.lax.while_loop(going, look, search)


def _adam(
    head: RewardHead,
    config: FitConfig,
    in_turn: bool,
    key: PRNGKey,
    start: Params,
    hparams: HParams,
    embeddings: Float[Array, "N d"],
    pairs: _Pairs,
    own: _Pairs,
) -> tuple[Params, FitInfo]:
    """One member by AdamW: find the number of steps on pairs held out, then take them on all pairs."""
    key_order, key_search, key_finish = jax.random.split(key, 3)
    n, capacity = len(embeddings), len(pairs.weight)
    descend = _make_descend(head, config, hparams, start)

    # Pairs in random order, the unlabelled last: fold f holds out every P-th of them from f on.
    labelled = pairs.weight > 0
    order = jnp.argsort(jnp.where(labelled, jax.random.uniform(key_order, (capacity,)), 2.0))
    deal = jnp.zeros(capacity, jnp.int32).at[order].set(jnp.arange(capacity, dtype=jnp.int32) % config.parts)
    fold = jnp.arange(config.folds, dtype=jnp.int32)[:, None]
    train = jax.vmap(lambda held: own._replace(weight=jnp.where(held, 0.0, own.weight)))(deal[None, :] == fold)
    places = fold + jnp.arange(0, capacity, config.parts, dtype=jnp.int32)[None, :]

    def search(train: _Pairs, rows: Float[Array, "F U d"] | None, held: int) -> tuple[Params, Array, Array, Array]:
        """With room for `held` pairs in a part."""
        ends, valid = jax.vmap(pairs.take)(order.at[places[:, :held]].get(mode="clip"))
        valid = valid._replace(weight=jnp.where(places[:, :held] < capacity, valid.weight, 0.0))
        found = _search(config, in_turn, descend, key_search, (train, rows), (valid, embeddings[ends]), shared)
        return jax.vmap(descend.params)(found.best), found.best_nll, found.best_steps, found.finite

    def finish(train: _Pairs, rows: Float[Array, "U d"]) -> Params:
        return descend.params(descend.steps(key_finish, descend.start, train, rows, 0, steps))

    shared, indexed = None, own
    if config.batch_size is not None:
        shared = embeddings
    elif not in_turn:
        # Heads under vmap share the rows of all labelled pairs, so that these are read once for all of them.
        ids, _, indexed = pairs.compact(n, 2 * capacity)
        shared, indexed = embeddings[ids], indexed._replace(weight=own.weight)
        train = jax.vmap(lambda one: indexed._replace(weight=one.weight))(train)

    steps, nll, finite = jnp.int32(config.steps), jnp.float32(jnp.nan), jnp.bool_(True)
    if config.holdout and shared is not None:
        best, nll, steps, finite = search(train, None, places.shape[1])
    elif config.holdout:
        ids, used, compact = jax.vmap(lambda one: one.compact(n, 2 * (capacity - capacity // config.parts)))(train)
        most = (labelled.sum() + config.parts - 1) // config.parts
        best, nll, steps, finite = _smallest(
            lambda size, held: search(compact, embeddings[ids[:, :size]], held),
            (ids.shape[1], used.max()),
            (places.shape[1], most),
        )

    seen = own.weight
    if config.holdout and config.folds == 1:
        params, seen = jax.tree.map(lambda leaf: leaf[0], best), train.weight[0]
    elif shared is not None:
        params = finish(indexed, shared)
    else:
        ids, used, indexed = own.compact(n, 2 * capacity)
        params = _smallest(lambda size: finish(indexed, embeddings[ids[:size]]), (len(ids), used))

    train_nll = _chunked_nll(head, params, embeddings, own._replace(weight=seen))
    return params, FitInfo(
        train_nll=train_nll,
        valid_nll=nll,
        steps=steps,
        status=jnp.where(finite & jnp.isfinite(train_nll), Status.OK, Status.DIVERGED).astype(jnp.int32),
    )


def _smallest(f: Callable[..., Any], *needs: tuple[int, Int[Array, ""]], steps: int = 3) -> Any:
    """Call f with sizes that hold what is needed of each capacity: it is compiled for a few, and one is branched to."""
    if max(capacity for capacity, _ in needs) < 128:
        return f(*(capacity for capacity, _ in needs))
    sizes = [tuple(-(-capacity * i // steps) for capacity, _ in needs) for i in range(1, steps + 1)]
    enough = jnp.stack([jnp.asarray(size) for size in sizes]) >= jnp.stack([need for _, need in needs])[None, :]
    return jax.lax.switch(jnp.argmax(enough.all(axis=1)), [functools.partial(f, *size) for size in sizes])


def _chunked_nll(head: RewardHead, params: Params, embeddings: Float[Array, "N d"], pairs: _Pairs) -> Float[Array, ""]:
    """Weighted mean loss of pairs, looked up a few at a time."""

    def one(pair: _Pairs) -> Float[Array, ""]:
        margin = head.rewards(params, embeddings[pair.first]) - head.rewards(params, embeddings[pair.second])
        return bradley_terry(margin, pair.label)

    return _mean(jax.lax.map(one, pairs, batch_size=256), pairs.weight)
