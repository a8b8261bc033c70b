"""What a rule gets to see in a round: the candidate pairs, and the belief about their responses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jarm.core.base import Belief, Labelled, PairSpace, RewardHead, Rule
from jarm.core.types import Array, Float, Int, Params, PRNGKey
from jarm.design.fisher import fisher_weight, pair_information, within_covariance
from jarm.design.spaces import compact, pair_space, subset
from jarm.loop.config import LoopConfig
from jarm.loop.device_table import DeviceTable
from jarm.loop.recorded import recorded_space


class Offer(NamedTuple):
    """The unlabelled pairs on offer in one round.

    Attributes:
      responses: `[n]` the responses that the pairs are about, None for all `N`.
      space: the pairs, in indices into these responses.
      everyone: where the responses are some of those of the round, all of them and their space; else None.
    """

    responses: Int[Array, "n"] | None
    space: PairSpace
    everyone: tuple[Int[Array, "m"] | None, PairSpace] | None = None


def draw_candidates(config: LoopConfig, key: PRNGKey, labelled: Labelled, table: DeviceTable) -> Offer:
    """The unlabelled pairs on offer in one round, the same whichever rules are compared.

    Args:
      config: how many prompts and candidate pairs are drawn, and the kind of pairs.
      key: chance of the draws.
      labelled: pairs that are left out.
      table: the training table.
    """
    key_prompts, key_candidates = jax.random.split(key)
    responses, whole = _unlabelled(config, key_prompts, labelled, table)
    if config.per_prompt is not None:
        whole = dataclasses.replace(whole, per_prompt=jnp.int32(config.per_prompt))
    if config.candidates is None or (whole.pairs is not None and len(whole.pairs) <= config.candidates):
        return Offer(responses, whole)
    space = subset(key_candidates, whole, config.candidates)
    if 2 * config.candidates >= space.size:
        return Offer(responses, space)
    # Few pairs of many responses: only the responses at their ends are scored.
    used, space = compact(space)
    return Offer(used if responses is None else responses[used], space, (responses, whole))


def covariance_of_round(
    rules: tuple[str | Rule, ...],
    offer: Offer,
    featurise: Callable[[Float[Array, "m d"]], Float[Array, "m F"]],
    table: DeviceTable,
) -> Float[Array, "F F"] | None:
    """`Belief.within_covariance`: None where the features of the offer tell it, or no rule of these may ask."""
    if offer.everyone is None or ("v_opt" not in rules and all(isinstance(rule, str) for rule in rules)):
        return None
    responses, space = offer.everyone
    return within_covariance(featurise(table.flat if responses is None else table.flat[responses]), space)


def _unlabelled(
    config: LoopConfig, key: PRNGKey, labelled: Labelled, table: DeviceTable
) -> tuple[Int[Array, "n"] | None, PairSpace]:
    """Every unlabelled pair of the prompts of a round, or every one on record; arguments as of `draw_candidates`."""
    count, width = table.mask.shape
    ends = jnp.stack([labelled.first, labelled.second], axis=1)
    if table.recorded is not None:
        return None, recorded_space(table.recorded, table.mask, jnp.where(labelled.mask[:, None], ends, count * width))
    if config.prompts is None:
        local, mask, alike, responses = ends, table.mask, table.alike, None
    else:
        prompts = jax.random.choice(key, count, (config.prompts,), replace=False).astype(jnp.int32)
        # Place of each prompt among those drawn; one that is not drawn is beyond them, and so are its responses.
        drawn = jnp.arange(config.prompts, dtype=jnp.int32)
        place = jnp.full(count, config.prompts, jnp.int32).at[prompts].set(drawn)
        local = place[ends // width] * width + ends % width
        mask, alike = table.mask[prompts], None if table.alike is None else table.alike[prompts]
        responses = (prompts[:, None] * width + jnp.arange(width, dtype=jnp.int32)[None, :]).reshape(-1)
    local = jnp.where(labelled.mask[:, None], local, mask.size)
    alike = None if alike is None else alike.reshape(-1)
    return responses, pair_space(config.pairs, width, mask.reshape(-1), local, alike)


def form_belief(
    config: LoopConfig,
    head: RewardHead,
    params: Params,
    labelled: Labelled,
    table: DeviceTable,
    offer: Offer,
) -> Belief:
    """The belief of an ensemble about some responses, and about the ends of the labelled pairs.

    Features are the first member's, since those of different heads have no common mean; rewards are the ensemble's.

    Args:
      config: of the loop; read for its rules and the number of members.
      head: the reward head.
      params: its parameters, with a leading axis K.
      labelled: the pairs labelled so far.
      table: the training table.
      offer: the pairs on offer, and their responses.
    """
    flat, responses = table.flat, offer.responses
    first_member = jax.tree.map(lambda leaf: leaf[0], params)
    others = jax.tree.map(lambda leaf: leaf[1:], params)

    def scored(rows: Float[Array, "n d"]) -> tuple[Float[Array, "n F"], Float[Array, "K n"]]:
        features = head.features(first_member, rows)
        rewards = [(features @ head.weights(first_member))[None]]
        if config.fit.members > 1:
            rewards.append(jax.vmap(head.rewards, in_axes=(0, None))(others, rows))
        return features, jnp.concatenate(rewards)

    features, member_rewards = scored(flat if responses is None else flat[responses])
    rewards = member_rewards.mean(axis=0)

    ends = jnp.stack([labelled.first, labelled.second])
    if responses is None:
        (phi_first, phi_second), (r_first, r_second) = features[ends], rewards[ends]
    else:
        phi, r = scored(flat[ends.reshape(-1)])
        (phi_first, phi_second), (r_first, r_second) = jnp.split(phi, 2), jnp.split(r.mean(axis=0), 2)
    real = labelled.mask[:, None]
    # The posterior of a head with a prior has the labels by their weights.
    weight = labelled.mask.astype(jnp.float32)
    if head.prior_precision is not None:
        weight = jnp.where(labelled.mask, labelled.weight, 0)
    return Belief(
        features=features,
        rewards=rewards,
        member_rewards=member_rewards,
        labelled_information=pair_information(phi_first, phi_second, fisher_weight(r_first - r_second) * weight),
        num_labelled=labelled.mask.sum(dtype=jnp.int32),
        labelled_features=jnp.where(real[:, :, None], jnp.stack([phi_first, phi_second], axis=1), 0),
        labelled_rewards=jnp.where(real, jnp.stack([r_first, r_second], axis=1), 0),
        prior_precision=None if head.prior_precision is None else head.prior_precision(first_member),
        within_covariance=covariance_of_round(
            config.rules, offer, functools.partial(head.features, first_member), table
        ),
    )
