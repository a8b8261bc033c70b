"""The steps of the loop on a state record: init, fit, choose, ask, tell.

Shapes are fixed from the start: the labelled set has room for the whole budget.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jarm.core.base import Fit, FitInfo, HParams, Labelled, RewardHead, Rule, Selection
from jarm.core.pytree import record
from jarm.core.settings import as_key, narrowed
from jarm.core.status import JarmError, Status, worst
from jarm.core.types import AnyKey, Array, Float, Int, Params, PRNGKey
from jarm.design.fisher import fisher_weight, pair_variance
from jarm.design.spaces import pair_space, sample_pairs
from jarm.loop.belief import draw_candidates, form_belief
from jarm.loop.config import LoopConfig
from jarm.loop.device_table import DeviceTable
from jarm.loop.first import choose_first, in_table
from jarm.loop.recorded import recorded_space
from jarm.loop.rules import pick


@dataclasses.dataclass(frozen=True)
class Parts:
    """The static parts of a loop, made once from its configuration.

    Attributes:
      config: the shape of a run.
      rules: the functions of `config.rules`.
      head: the reward head.
      fit: fits K heads to the labelled pairs.
    """

    config: LoopConfig
    rules: tuple[Rule, ...]
    head: RewardHead
    fit: Fit


@record
class LoopState:
    """What is carried from round to round.

    Attributes:
      key: source of everything that is still to be drawn.
      round: scalar int32, batches recorded so far.
      labelled: the pairs labelled so far, at the capacity of the whole budget.
      params: heads of the last fit, with a leading axis K.
      status: scalar int32, worst `Status` so far.
    """

    key: PRNGKey
    round: Int[Array, ""]
    labelled: Labelled
    params: Params
    status: Int[Array, ""]


class Choice(NamedTuple):
    """A batch, and the belief about its pairs when they were chosen.

    Attributes:
      selection: the batch, in indices into the N responses of the table.
      weight: `[B]` Fisher weight p (1 - p) of each pair, p the ensemble's probability.
      variance: `[B]` variance of each pair's reward difference over the ensemble.
    """

    selection: Selection
    weight: Float[Array, "B"]
    variance: Float[Array, "B"]


def init(
    parts: Parts,
    key: AnyKey,
    table: DeviceTable,
    hparams: HParams | None = None,
    rule: int | Array | None = None,
) -> tuple[LoopState, Selection]:
    """An empty state with fresh heads, and the pairs to label first; if chosen, by the prior variance of `hparams`.

    Those of the rule `random` are drawn, whatever `first` says, so that it is a baseline of the whole campaign.

    Raises:
      JarmError: they are chosen, and there are no `hparams`.
    """
    config = parts.config
    key, key_first, key_params = jax.random.split(as_key(key), 3)
    heads = jax.vmap(lambda each: parts.head.init(each, table.embeddings.shape[2]))
    nothing = jnp.zeros(config.budget, jnp.float32)
    nowhere = jnp.zeros(config.budget, jnp.int32)
    state = LoopState(
        key=key,
        round=jnp.int32(0),
        labelled=Labelled(nowhere, nowhere, nothing, nothing, jnp.zeros(config.budget, bool)),
        params=heads(jax.random.split(key_params, config.fit.members)),
        status=jnp.int32(Status.OK),
    )
    if config.first == "random":
        return state, _drawn(config, key_first, table)
    if hparams is None:
        raise JarmError(f"A first batch by {config.first} needs a prior variance: give init(key, table, hparams).")
    given = hparams.as_float32()

    def chosen() -> Selection:
        return choose_first(config, key_first, given, state.labelled, table)

    if rule is None or "random" not in config.rules:
        return state, chosen()
    is_baseline = jnp.asarray(rule) == config.rules.index("random")
    return state, jax.lax.cond(is_baseline, lambda: _drawn(config, key_first, table), chosen)


def _drawn(config: LoopConfig, key: PRNGKey, table: DeviceTable) -> Selection:
    """A first batch of random pairs."""
    if table.recorded is not None:
        space = recorded_space(table.recorded, table.mask)
    else:
        alike = None if table.alike is None else table.alike.reshape(-1)
        space = pair_space(config.pairs, table.mask.shape[1], table.mask.reshape(-1), alike=alike)
    pairs, valid = sample_pairs(key, space, config.initial)
    status = jnp.where(valid.all(), jnp.int32(Status.OK), jnp.int32(Status.EXHAUSTED))
    ones = jnp.ones(config.initial, jnp.float32)
    return Selection(pairs, 0 * ones, valid, status, weights=ones)


def fit(parts: Parts, hparams: HParams, state: LoopState, table: DeviceTable) -> tuple[LoopState, FitInfo]:
    """Fit the heads to the labelled pairs."""
    key = jax.random.fold_in(as_key(state.key), 2 * state.round)
    warm = state.params if parts.config.warm_start else None
    hparams = hparams.as_float32()
    # In units of the embeddings, since a fit knows no prompts.
    hparams = dataclasses.replace(hparams, prior_variance=hparams.prior_variance / table.spread_within)
    params, info = parts.fit(key, hparams, table.flat, state.labelled, warm)
    params = narrowed(params)  # a fit of one's own may leave the types to the settings
    return dataclasses.replace(state, params=params, status=worst(state.status, info.status)), info


def choose(parts: Parts, hparams: HParams, state: LoopState, table: DeviceTable, rule: int | Array = 0) -> Choice:
    """The next batch, picked with the heads of the state."""
    config = parts.config
    key_space, key_rule = jax.random.split(jax.random.fold_in(as_key(state.key), 2 * state.round + 1))
    offer = draw_candidates(config, key_space, state.labelled, table)
    # On some accelerators a plain product has a third of the digits of its type, too few for differences.
    with jax.default_matmul_precision("highest"):
        belief = form_belief(config, parts.head, state.params, state.labelled, table, offer)
    selection = pick(config, parts.rules, key_rule, hparams.as_float32(), belief, offer.space, rule)
    weight = fisher_weight(belief.rewards[selection.pairs[:, 0]] - belief.rewards[selection.pairs[:, 1]])
    variance = pair_variance(belief.member_rewards, selection.pairs)
    return Choice(in_table(selection, offer.responses), weight, variance)


def select(parts: Parts, hparams: HParams, state: LoopState, table: DeviceTable, rule: int | Array = 0) -> Selection:
    """The batch of `choose` alone."""
    return choose(parts, hparams, state, table, rule).selection


def ask(
    parts: Parts, hparams: HParams, state: LoopState, table: DeviceTable, rule: int | Array = 0
) -> tuple[LoopState, Selection]:
    """`fit`, then `select`."""
    state, _ = fit(parts, hparams, state, table)
    selection = select(parts, hparams, state, table, rule)
    return dataclasses.replace(state, status=worst(state.status, selection.status)), selection


def tell(state: LoopState, selection: Selection, labels: Float[Array, "B"]) -> LoopState:
    """Record the labels of a batch.

    Args:
      state: the loop so far.
      selection: the batch, as asked; pairs that are not valid are dropped.
      labels: `[B]` probability in [0, 1] that the first response is preferred.

    Returns:
      The next state. Its status is FULL where the labels exceed the budget, and NONFINITE where a label is not in
      [0, 1].
    """
    old, capacity = state.labelled, len(state.labelled.mask)
    start = old.mask.sum(dtype=jnp.int32)

    def write(into: Array, values: Array) -> Array:
        # Valid pairs are stored one after the other; a place beyond the capacity is dropped.
        place = jnp.where(selection.valid, start + jnp.cumsum(selection.valid, dtype=jnp.int32) - 1, capacity)
        return into.at[place].set(values.astype(into.dtype), mode="drop")

    labelled = Labelled(
        first=write(old.first, selection.pairs[:, 0]),
        second=write(old.second, selection.pairs[:, 1]),
        label=write(old.label, labels),
        weight=write(old.weight, jnp.ones_like(labels) if selection.weights is None else selection.weights),
        mask=write(old.mask, selection.valid),
    )
    full = start + selection.valid.sum(dtype=jnp.int32) > capacity
    outside = (selection.valid & ~((labels >= 0) & (labels <= 1))).any()
    status = worst(
        state.status,
        selection.status,
        jnp.where(full, jnp.int32(Status.FULL), jnp.int32(Status.OK)),
        jnp.where(outside, jnp.int32(Status.NONFINITE), jnp.int32(Status.OK)),
    )
    return dataclasses.replace(state, labelled=labelled, round=state.round + 1, status=status)
