"""MLP heads by AdamW, stopped early: deal the pairs, find the number of steps on held-out pairs, finish on all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

from jarm.core.base import FitInfo, RewardHead
from jarm.core.settings import plain_types
from jarm.core.status import Status
from jarm.core.types import Array, Bool, Float, Int, Params, PRNGKey
from jarm.reward.config import FitConfig
from jarm.reward.training import FitParts, FitProblem, Pairs, TrainingSet, pair_loss, smallest_capacity, weighted_mean

_State: TypeAlias = tuple[Float[Array, "W"], optax.OptState]
"""Parameters as one vector, which compiles faster than many arrays, and the state of the optimiser."""


def fit_by_descent(parts: FitParts, key: PRNGKey, problem: FitProblem) -> tuple[Params, FitInfo]:
    """Members by AdamW: find the number of steps on held-out pairs, then take them on all pairs.

    With one fold the heads of the search are the members, as they were at the best check.
    """
    key_order, key_search, key_finish = jax.random.split(key, 3)
    config, members = parts.config, len(problem.weights)
    descent = _make_descent(parts, problem)
    starts = jax.vmap(descent.start)(problem.starts)
    steps, nll, finite = jnp.int32(config.steps), jnp.float32(jnp.nan), jnp.bool_(True)
    if config.holdout:
        deal = _deal(config, key_order, problem)
        found = _find(descent, key_search, deal, starts, problem.pairs.weight)
        steps, nll, finite = found.best_steps, found.best_nll, found.finite
    if config.holdout and config.folds == 1:
        params, weights = jax.vmap(descent.params)(found.best), deal.weights
    else:
        params, weights = _finish(descent, key_finish, steps, starts, problem.weights), problem.weights

    def train_nll(xs: tuple[Params, Float[Array, "L"]]) -> Float[Array, ""]:
        return _chunked_loss(config.loss, parts.head, xs[0], problem.embeddings, problem.pairs._replace(weight=xs[1]))

    losses = parts.over_members(train_nll, (params, weights))
    return params, FitInfo(
        train_nll=losses,
        valid_nll=jnp.full(members, nll, jnp.float32),
        steps=jnp.full(members, steps, jnp.int32),
        status=jnp.where(finite & jnp.isfinite(losses), Status.OK, Status.DIVERGED).astype(jnp.int32),
    )


@dataclasses.dataclass(frozen=True)
class _Descent:
    """AdamW on the mean loss of training sets, over the rows of one array.

    Attributes:
      parts: head and configuration.
      optimiser: AdamW.
      unravel: parameters of a vector.
      rows: `[N, d]` embeddings that training sets index.
      pairs: the labelled pairs, as indices into `rows`.
      own_rows: whether each head reads the responses of its own pairs, each once; else all read `rows`.
    """

    parts: FitParts
    optimiser: optax.GradientTransformation
    unravel: Callable[[Array], Params]
    rows: Float[Array, "N d"]
    pairs: Pairs
    own_rows: bool

    def start(self, params: Params) -> _State:
        """Where a descent from these parameters starts."""
        vector, _ = jax.flatten_util.ravel_pytree(_transposed(params))
        return vector, self.optimiser.init(vector)

    def params(self, vector: Float[Array, "W"]) -> Params:
        """The parameters of a vector."""
        return _transposed(self.unravel(vector))

    def loss(self, vector: Float[Array, "W"], pairs: Pairs, rows: Float[Array, "U d"]) -> Float[Array, ""]:
        """Mean loss of pairs."""
        return pairs.mean_loss(self.parts.config.loss, self.parts.head.rewards(self.params(vector), rows))

    def steps(
        self, key: PRNGKey, index: Array, state: _State, train: TrainingSet, first: Array | int, last: Array | int
    ) -> _State:
        """Steps number `first` to `last` of the head of that index."""
        key, rows, size = jax.random.fold_in(key, index), train.rows(self.rows), self.parts.config.batch_size

        def step(i: Int[Array, ""], state: _State) -> _State:
            vector, opt = state
            if size is None:
                gradient = jax.grad(self.loss)(vector, train.pairs, rows)
            else:
                drawn = _minibatch(jax.random.fold_in(key, i), train.pairs, size)
                gradient = jax.grad(self.loss)(vector, drawn.pairs, drawn.rows(rows))
            with plain_types():  # a power of Adam's would be float64, and round otherwise
                updates, opt = self.optimiser.update(gradient, opt, vector)
            return optax.apply_updates(vector, updates), opt

        return jax.lax.fori_loop(first, last, step, state)

    def training_sets(self, weights: Float[Array, "H L"], max_responses: int) -> tuple[TrainingSet, int, Array]:
        """The training sets of H heads.

        Args:
          weights: `[H, L]` weights of the pairs for each head.
          max_responses: upper bound on the responses of a head.

        Returns:
          The sets, with a leading axis H; room for responses in each; and how many the largest has.
        """
        weighted = jax.vmap(lambda weight: self.pairs._replace(weight=weight))(weights)
        if not self.own_rows:
            return TrainingSet(weighted, None), 0, jnp.int32(0)
        n, room = len(self.rows), min(len(self.rows), max_responses)
        sets, used = jax.vmap(lambda pairs: pairs.compact(n, room))(weighted)
        return sets, room, used.max()


def _make_descent(parts: FitParts, problem: FitProblem) -> _Descent:
    own_rows = parts.sequential and parts.config.batch_size is None
    rows, pairs = problem.embeddings, problem.pairs
    if not parts.sequential and parts.config.batch_size is None:
        # Heads under vmap share the rows of all labelled pairs, so that these are read once for all of them; a row for
        # each end of a pair, since adding up the gradients of a shared row has no fixed order on an accelerator.
        everything = pairs.take(jnp.arange(len(pairs.weight), dtype=jnp.int32))
        rows, pairs = everything.rows(rows), everything.pairs
    _, unravel = jax.flatten_util.ravel_pytree(_transposed(jax.tree.map(lambda leaf: leaf[0], problem.starts)))
    optimiser = optax.adamw(problem.hparams.learning_rate, weight_decay=problem.hparams.weight_decay)
    return _Descent(parts, optimiser, unravel, rows, pairs, own_rows)


def _transposed(params: Params) -> Params:
    """Kernels as [out, in] and back: XLA on CPU forms the gradient of a wide first layer as [in, out] at a fifth of
    that speed, and Adam, elementwise, is the same either way.
    """
    return jax.tree.map(lambda leaf: leaf.T if leaf.ndim == 2 else leaf, params)


def _minibatch(key: PRNGKey, pairs: Pairs, size: int) -> TrainingSet:
    """Pairs drawn with replacement in proportion to their weight; each drawn pair weighs 1."""
    total = jnp.cumsum(pairs.weight)
    at = jnp.searchsorted(total, total[-1] * jax.random.uniform(key, (size,), jnp.float32), side="right")
    drawn = pairs.take(at.clip(max=len(total) - 1))
    return drawn._replace(pairs=drawn.pairs._replace(weight=jnp.ones(size, jnp.float32)))


class _Deal(NamedTuple):
    """Labelled pairs dealt to H heads, each of which holds out one part.

    Attributes:
      weights: `[H, L]` weights of the pairs that each head trains on; 0 for its part.
      held_out: `[H, M]` places of the pairs of its part; L where there are fewer.
      max_held_out: pairs of the largest part.
    """

    weights: Float[Array, "H L"]
    held_out: Int[Array, "H M"]
    max_held_out: Int[Array, ""]


def _deal(config: FitConfig, key: PRNGKey, problem: FitProblem) -> _Deal:
    """Deal the labelled pairs into parts at random: part p is every P-th pair of a random order, from p on."""
    weight, capacity, parts = problem.pairs.weight, len(problem.pairs.weight), config.parts
    heads = len(problem.weights) if config.folds == 1 else config.folds
    weights = problem.weights if config.folds == 1 else jnp.tile(weight, (config.folds, 1))
    labelled, part = weight > 0, (jnp.arange(heads, dtype=jnp.int32) % parts)[:, None]
    ticket = jnp.where(labelled, jax.random.uniform(key, (capacity,), jnp.float32), 2.0)  # the unlabelled come last
    order = jnp.argsort(ticket).astype(jnp.int32)
    dealt = jnp.zeros(capacity, jnp.int32).at[order].set(jnp.arange(capacity, dtype=jnp.int32) % parts)
    places = part + jnp.arange(0, capacity, parts, dtype=jnp.int32)[None, :]
    return _Deal(
        weights=jnp.where(dealt[None, :] == part, 0.0, weights),
        held_out=order.at[places].get(mode="fill", fill_value=capacity),
        max_held_out=(labelled.sum(dtype=jnp.int32) + parts - 1) // parts,
    )


class _Search(NamedTuple):
    """All heads of a search, their number of steps, and the best so far.

    Attributes:
      heads: where each stands.
      steps: steps taken.
      best: `[H, W]` parameters at the check of the lowest held-out loss.
      best_nll, best_steps: that loss, in nats, and the steps up to it.
      finite: whether the last held-out loss was finite.
    """

    heads: _State
    steps: Int[Array, ""]
    best: Float[Array, "H W"]
    best_nll: Float[Array, ""]
    best_steps: Int[Array, ""]
    finite: Bool[Array, ""]


def _find(descent: _Descent, key: PRNGKey, deal: _Deal, starts: _State, weight: Float[Array, "L"]) -> _Search:
    """Find the number of steps: all heads descend side by side until the mean held-out loss stops falling."""
    parts, config, capacity = descent.parts, descent.parts.config, len(weight)
    heads = jnp.arange(len(deal.weights), dtype=jnp.int32)
    sets, room, used = descent.training_sets(deal.weights, 2 * (capacity - capacity // config.parts))

    def advance(states: _State, first: Array, last: Array) -> tuple[_State, Float[Array, "H"]]:
        """Take all heads from one number of steps to another, and their held-out losses there."""

        def one(xs: tuple[Array, _State, TrainingSet, Array]) -> tuple[_State, Float[Array, ""]]:
            index, state, train, held_out = xs

            def sized(responses: int, count: int) -> tuple[_State, Float[Array, ""]]:
                after = descent.steps(key, index, state, train.narrow(responses), first, last)
                valid = descent.pairs.take(held_out[:count])
                return after, descent.loss(after[0], valid.pairs, valid.rows(descent.rows))

            needs = (room, used), (deal.held_out.shape[1], deal.max_held_out)
            return smallest_capacity(descent.own_rows, sized, *needs)

        return parts.over_members(one, (heads, states, sets, deal.held_out))

    held_out_weight = weight.at[deal.held_out].get(mode="fill", fill_value=0.0).sum(axis=1)
    return _search(config, advance, jax.tree.map(lambda leaf: leaf[heads % len(leaf)], starts), held_out_weight)


def _search(
    config: FitConfig,
    advance: Callable[[_State, Array, Array], tuple[_State, Float[Array, "H"]]],
    heads: _State,
    weights: Float[Array, "H"],
) -> _Search:
    """Advance all heads from check to check while the mean held-out loss falls.

    Args:
      config: steps between checks, and patience.
      advance: `(heads, first, last) -> (heads, losses)`, the losses on the pairs that each holds out.
      heads: where they start.
      weights: `[H]` weight of each loss.
    """

    def check(search: _Search) -> _Search:
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
    return jax.lax.while_loop(going, check, search)


def _finish(
    descent: _Descent, key: PRNGKey, steps: Int[Array, ""], starts: _State, weights: Float[Array, "K L"]
) -> Params:
    """Fresh members after that many steps on all labelled pairs."""
    sets, room, used = descent.training_sets(weights, 2 * weights.shape[1])
    heads = jnp.arange(len(weights), dtype=jnp.int32)

    def finish(responses: int) -> Params:
        def one(xs: tuple[Array, _State, TrainingSet]) -> Params:
            return descent.params(descent.steps(key, *xs, 0, steps)[0])

        return descent.parts.over_members(one, (heads, starts, sets.narrow(responses)))

    return smallest_capacity(descent.own_rows, finish, (room, used))


def _chunked_loss(
    kind: str, head: RewardHead, params: Params, embeddings: Float[Array, "N d"], pairs: Pairs
) -> Float[Array, ""]:
    """Weighted mean loss of pairs, whose embeddings are gathered a few at a time."""

    def one(pair: Pairs) -> Float[Array, ""]:
        first, second = (head.rewards(params, embeddings[end]) for end in (pair.first, pair.second))
        return pair_loss(kind, first, second, pair.label)

    return weighted_mean(jax.lax.map(one, pairs, batch_size=256), pairs.weight)
