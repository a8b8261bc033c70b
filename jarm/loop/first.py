"""The first batch, chosen before there is any label: for a linear head of weights 0 and a laplace head's prior."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jarm.acquisition.check import check_selection
from jarm.acquisition.registry import get_rule
from jarm.core.base import Belief, HParams, Labelled, Selection
from jarm.core.status import Status
from jarm.core.types import Array, Bool, Int, PRNGKey
from jarm.loop.belief import covariance_of_round, draw_candidates
from jarm.loop.config import FIRST, LoopConfig
from jarm.loop.device_table import DeviceTable

SLACK = 1.25
"""Prompts that a first batch has a choice of, over those that it takes, for its limit of pairs per prompt."""


def choose_first(
    config: LoopConfig, key: PRNGKey, hparams: HParams, labelled: Labelled, table: DeviceTable
) -> Selection:
    """The first batch by `config.first`: every margin is 0, and the information is that of the prior.

    Where the config has no limit of pairs per prompt, it is the smallest that leaves a choice of prompts: 1 where there
    are 1.25 times as many as pairs (within), or 2.5 times (otherwise, since a pair across prompts takes two). It is
    doubled until the batch is full, since prompts may hold fewer pairs than that.

    Args:
      config: of the loop.
      key: chance of the candidates.
      hparams: read for the prior variance.
      labelled: without any label.
      table: the training table.

    Returns:
      The pairs, in indices into the `N` responses of the table.
    """
    key_space, key_rule = jax.random.split(key)
    offer = draw_candidates(config, key_space, labelled, table)
    rule, (responses, space, _) = FIRST[config.first], offer
    features = table.flat if responses is None else table.flat[responses]
    size, width = features.shape
    belief = Belief(
        features=features,
        rewards=jnp.zeros(size, jnp.float32),
        member_rewards=jnp.zeros((config.fit.members, size), jnp.float32),
        labelled_information=jnp.zeros((width, width), jnp.float32),
        num_labelled=jnp.int32(0),
        labelled_features=jnp.zeros((0, 2, width), jnp.float32),
        labelled_rewards=jnp.zeros((0, 2), jnp.float32),
        prior_precision=table.spread_within / hparams.prior_variance,
        within_covariance=covariance_of_round((rule,), offer, lambda rows: rows, table),
    )
    k = config.initial
    smallest, largest = _caps(config, table) if space.per_prompt is None else (space.per_prompt, space.per_prompt)

    def wider(tried: tuple[Int[Array, ""], Selection]) -> tuple[Int[Array, ""], Selection]:
        cap = jnp.where(tried[0] == 0, smallest, 2 * tried[0])
        return cap, get_rule(rule)(key_rule, hparams, belief, dataclasses.replace(space, per_prompt=cap), k)

    def too_narrow(tried: tuple[Int[Array, ""], Selection]) -> Bool[Array, ""]:
        return ~tried[1].valid.all() & (tried[0] < largest)

    nothing = Selection(
        jnp.zeros((k, 2), jnp.int32), jnp.zeros(k, jnp.float32), jnp.zeros(k, bool), jnp.int32(Status.OK)
    )
    _, selection = jax.lax.while_loop(too_narrow, wider, (jnp.int32(0), nothing))
    return in_table(check_selection(selection, space, k, rule), responses)


def _caps(config: LoopConfig, table: DeviceTable) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The smallest limit of pairs per prompt that is tried, and one that is none."""
    real, taken = table.mask.sum(axis=1, dtype=jnp.int32), 1 if config.pairs == "within" else 2
    prompts = (real >= 3 - taken).sum(dtype=jnp.float32)
    if table.recorded is not None:
        asked = table.recorded.pairs[:, 0] // table.mask.shape[1]
        prompts = jnp.zeros(len(real), bool).at[asked].set(True).sum(dtype=jnp.float32)
    if config.prompts is not None:
        prompts = jnp.minimum(prompts, config.prompts)
    return jnp.ceil(SLACK * taken * config.initial / prompts).astype(jnp.int32), jnp.int32(config.initial)


def in_table(selection: Selection, responses: Int[Array, "n"] | None) -> Selection:
    """A batch of some responses, `[n]` indices into those of a table, as one of the table; None where all are in."""
    pairs = selection.pairs if responses is None else jnp.sort(responses[selection.pairs], axis=1)
    return dataclasses.replace(selection, pairs=jnp.where(selection.valid[:, None], pairs, 0))
