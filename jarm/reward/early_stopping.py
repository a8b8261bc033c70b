"""MLP heads by AdamW, stopped early on held-out labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax.flatten_util
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

from jarm.core.base import FitInfo, HParams, RewardHead
from jarm.core.status import Status
from jarm.core.types import Array, Bool, Float, Int, Params, PRNGKey
from jarm.reward.config import FitConfig
from jarm.reward.training import Pairs, Task, _over, pair_loss, smallest, weighted_mean

_Descent: TypeAlias = tuple[Float[Array, "W"], optax.OptState]
"""Where a descent stands: the parameters as one vector, which compiles faster than many, and the optimiser."""


class _Descend(NamedTuple):
    """AdamW on the loss of a task, as functions of where it stands."""

    start: Callable[[Params], _Descent]
    steps: Callable[[PRNGKey, Array, _Descent, Task, Array | int, Array | int], _Descent]
    nll: Callable[[Float[Array, "W"], Task], Float[Array, ""]]
    params: Callable[[Float[Array, "W"]], Params]


def _make_descend(
    head: RewardHead, config: FitConfig, hparams: HParams, example: Params, table: Float[Array, "N d"]
) -> _Descend:
    optimiser = optax.adamw(hparams.learning_rate, weight_decay=hparams.weight_decay)

    # Kernels are descended on as [out, in]: XLA on CPU forms the gradient of a wide first layer as [in, out] at a fifth
    # of that speed, and Adam, elementwise, does not mind.
    def flip(params: Params) -> Params:
        return jax.tree.map(lambda leaf: leaf.T if leaf.ndim == 2 else leaf, params)

    _, unravel = jax.flatten_util.ravel_pytree(flip(example))

    def start(params: Params) -> _Descent:
        vector, _ = jax.flatten_util.ravel_pytree(flip(params))
        return vector, optimiser.init(vector)

    def params(vector: Float[Array, "W"]) -> Params:
        return flip(unravel(vector))

    def loss(vector: Float[Array, "W"], pairs: Pairs, rows: Float[Array, "U d"]) -> Float[Array, ""]:
        return pairs.mean_loss(config.loss, head.rewards(params(vector), rows))

    def minibatch(key: PRNGKey, pairs: Pairs, size: int) -> Task:
        total = jnp.cumsum(pairs.weight)
        at = jnp.searchsorted(total, total[-1] * jax.random.uniform(key, (size,)), side="right")
        drawn = pairs.take(at.clip(max=len(total) - 1))
        return drawn._replace(pairs=drawn.pairs._replace(weight=jnp.ones(size)))

    def steps(
        key: PRNGKey, index: Array, descent: _Descent, task: Task, first: Array | int, last: Array | int
    ) -> _Descent:
        """Steps number `first` to `last` of the head of that index."""
        key, rows = jax.random.fold_in(key, index), task.rows(table)

        def step(i: Int[Array, ""], descent: _Descent) -> _Descent:
            vector, opt = descent
            if config.batch_size is None:
                gradient = jax.grad(loss)(vector, task.pairs, rows)
            else:
                drawn = minibatch(jax.random.fold_in(key, i), task.pairs, config.batch_size)
                gradient = jax.grad(loss)(vector, drawn.pairs, drawn.rows(rows))
            updates, opt = optimiser.update(gradient, opt, vector)
            return optax.apply_updates(vector, updates), opt

        return jax.lax.fori_loop(first, last, step, descent)

    def nll(vector: Float[Array, "W"], task: Task) -> Float[Array, ""]:
        return loss(vector, task.pairs, task.rows(table))

    return _Descend(start, steps, nll, params)


class _Search(NamedTuple):
    """Where all heads stand, after how many steps, and what was best so far."""

    heads: _Descent
    steps: Int[Array, ""]
    best: Float[Array, "H W"]
    best_nll: Float[Array, ""]
    best_steps: Int[Array, ""]
    finite: Bool[Array, ""]


def _search(
    config: FitConfig,
    advance: Callable[[_Descent, Array, Array], tuple[_Descent, Float[Array, "H"]]],
    heads: _Descent,
    weights: Float[Array, "H"],
) -> _Search:
    """Descend with all heads side by side, until the mean loss of all that they hold out stops falling.

    Args:
      config: when to look, and how patiently.
      advance: takes all heads from one number of steps to another, and says what they then lose on what they hold out.
      heads: where they start.
      weights: of what each holds out.
    """

    def look(search: _Search) -> _Search:
        last = jnp.minimum(search.steps + config.check_every, config.steps)
        heads, losses = advance(search.heads, search.steps, last)
        nll = weighted_mean(losses, weights)
        better = nll < search.best_nll
        return _Search(
            heads=heads,
            steps=last,
            best=jnp.where(better, heads[0], search.best),
            best_nll=jnp.where(better, nll, search.best_nll),
            best_steps=jnp.where(better, last, search.best_steps),
            finite=jnp.isfinite(nll),
        )

    def going(search: _Search) -> Bool[Array, ""]:
        patient = search.steps - search.best_steps < config.check_every * config.patience
        return patient & (search.steps < config.steps) & search.finite

    search = _Search(heads, jnp.int32(0), heads[0], jnp.float32(jnp.inf), jnp.int32(0), jnp.bool_(True))
    return jax.lax.while_loop(going, look, search)


def _early_stopped(
    head: RewardHead,
    config: FitConfig,
    in_turn: bool,
    key: PRNGKey,
    hparams: HParams,
    starts: Params,
    embeddings: Float[Array, "N d"],
    pairs: Pairs,
    weights: Float[Array, "K L"],
) -> tuple[Params, FitInfo]:
    """Members by AdamW: find the number of steps on pairs held out, then take them on all pairs."""
    key_order, key_search, key_finish = jax.random.split(key, 3)
    members, capacity = weights.shape
    own_rows = in_turn and config.batch_size is None
    table, indexed = embeddings, pairs
    if not in_turn and config.batch_size is None:
        # Heads under vmap share the rows of all labelled pairs, so that these are read once for all of them; a row for
        # each end of a pair, since adding up the gradients of a shared row has no fixed order on an accelerator.
        everything = pairs.take(jnp.arange(capacity, dtype=jnp.int32))
        table, indexed = everything.rows(embeddings), everything.pairs
    descend = _make_descend(head, config, hparams, jax.tree.map(lambda leaf: leaf[0], starts), table)
    begin = jax.vmap(descend.start)(starts)

    def tasks(weights: Float[Array, "H L"], most: int) -> tuple[Task, int, Int[Array, ""]]:
        """What heads train on, room for its responses, and how many the largest has."""
        weighted = jax.vmap(lambda weight: indexed._replace(weight=weight))(weights)
        if not own_rows:
            return Task(weighted, None), 0, jnp.int32(0)
        room = min(len(table), most)
        task, used = jax.vmap(lambda one: one.compact(len(table), room))(weighted)
        return task, room, used.max()

    steps, nll, finite = jnp.int32(config.steps), jnp.float32(jnp.nan), jnp.bool_(True)
    if config.holdout:
        heads = jnp.arange(members if config.folds == 1 else config.folds, dtype=jnp.int32)
        weights_found = weights if config.folds == 1 else jnp.tile(pairs.weight, (config.folds, 1))
        # Pairs in random order, the unlabelled last: part p is every P-th of them from p on.
        labelled, part = pairs.weight > 0, (heads % config.parts)[:, None]
        order = jnp.argsort(jnp.where(labelled, jax.random.uniform(key_order, (capacity,)), 2.0))
        deal = jnp.zeros(capacity, jnp.int32).at[order].set(jnp.arange(capacity, dtype=jnp.int32) % config.parts)
        seen = jnp.where(deal[None, :] == part, 0.0, weights_found)
        places = part + jnp.arange(0, capacity, config.parts, dtype=jnp.int32)[None, :]
        held = order.at[places].get(mode="fill", fill_value=capacity)
        most_held = (labelled.sum() + config.parts - 1) // config.parts
        task, room, used = tasks(seen, 2 * (capacity - capacity // config.parts))

        def advance(descents: _Descent, first: Array, last: Array) -> tuple[_Descent, Float[Array, "H"]]:
            def one(xs: tuple[Array, _Descent, Task, Array]) -> tuple[_Descent, Float[Array, ""]]:
                index, descent, train, out = xs

                def sized(size: int, count: int) -> tuple[_Descent, Float[Array, ""]]:
                    there = descend.steps(key_search, index, descent, train.narrow(size), first, last)
                    return there, descend.nll(there[0], indexed.take(out[:count]))

                return smallest(own_rows, sized, (room, used), (held.shape[1], most_held))

            return _over(in_turn, one, (heads, descents, task, held))

        found = _search(
            config,
            advance,
            jax.tree.map(lambda leaf: leaf[heads % members], begin),
            pairs.weight.at[held].get(mode="fill", fill_value=0.0).sum(axis=1),
        )
        best, nll, steps, finite = jax.vmap(descend.params)(found.best), found.best_nll, found.best_steps, found.finite

    if config.holdout and config.folds == 1:
        params = best
    else:
        seen = weights
        task, room, used = tasks(weights, 2 * capacity)

        def finish(size: int) -> Params:
            def one(xs: tuple[Array, _Descent, Task]) -> Params:
                return descend.params(descend.steps(key_finish, *xs, 0, steps)[0])

            return _over(in_turn, one, (jnp.arange(members, dtype=jnp.int32), begin, task.narrow(size)))

        params = smallest(own_rows, finish, (room, used))

    def train_nll(xs: tuple[Params, Float[Array, "L"]]) -> Float[Array, ""]:
        return _chunked_loss(config.loss, head, xs[0], embeddings, pairs._replace(weight=xs[1]))

    losses = _over(in_turn, train_nll, (params, seen))
    ok = finite & jnp.isfinite(losses)
    return params, FitInfo(
        train_nll=losses,
        valid_nll=jnp.full(members, nll),
        steps=jnp.full(members, steps),
        status=jnp.where(ok, Status.OK, Status.DIVERGED).astype(jnp.int32),
    )


def _chunked_loss(
    kind: str, head: RewardHead, params: Params, embeddings: Float[Array, "N d"], pairs: Pairs
) -> Float[Array, ""]:
    """Weighted mean loss of pairs, looked up a few at a time."""

    def one(pair: Pairs) -> Float[Array, ""]:
        first, second = (head.rewards(params, embeddings[end]) for end in (pair.first, pair.second))
        return pair_loss(kind, first, second, pair.label)

    return weighted_mean(jax.lax.map(one, pairs, batch_size=256), pairs.weight)
