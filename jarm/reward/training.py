"""What all fits share: static parts, the problem, and training sets in which each response is scored once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jarm.core.base import HParams, RewardHead
from jarm.core.types import Array, Float, Int, Params
from jarm.reward.config import FitConfig
from jarm.reward.losses import bradley_terry, classification


class Pairs(NamedTuple):
    """Weighted pairs, as indices into some rows of embeddings.

    Attributes:
      first, second: `[L]` int32 rows.
      label: `[L]` probability in [0, 1] that the first is preferred.
      weight: `[L]` weight in the loss; 0 for padding.
    """

    first: Int[Array, "L"]
    second: Int[Array, "L"]
    label: Float[Array, "L"]
    weight: Float[Array, "L"]

    def mean_loss(self, kind: str, rewards: Float[Array, "U"]) -> Float[Array, ""]:
        """Weighted mean loss, given the rewards of the rows."""
        return weighted_mean(pair_loss(kind, rewards[self.first], rewards[self.second], self.label), self.weight)

    def take(self, at: Int[Array, "B"]) -> TrainingSet:
        """The pairs at some places, on a row for each of their ends; out-of-range places select padding of weight 0."""
        ends = jnp.concatenate([self.first[at], self.second[at]])
        places = jnp.arange(len(ends), dtype=jnp.int32).reshape(2, -1)
        weight = self.weight.at[at].get(mode="fill", fill_value=0.0)
        return TrainingSet(Pairs(places[0], places[1], self.label[at], weight), ends)

    def compact(self, n: int, capacity: int) -> tuple[TrainingSet, Int[Array, ""]]:
        """All pairs, on the responses of those with a weight, each once.

        Args:
          n: responses in all.
          capacity: room for the responses in use.

        Returns:
          The training set, and how many responses are in use.
        """
        used = (self.weight > 0)[None, :]
        ends = jnp.where(used, jnp.stack([self.first, self.second]), n)
        present = jnp.zeros(n, bool).at[ends].set(True, mode="drop")
        place = jnp.cumsum(present, dtype=jnp.int32) - 1
        responses = jnp.arange(n, dtype=jnp.int32)
        ids = jnp.zeros(capacity, jnp.int32).at[jnp.where(present, place, capacity)].set(responses, mode="drop")
        first, second = jnp.where(used, place[ends.clip(max=n - 1)], 0)
        return TrainingSet(self._replace(first=first, second=second), ids), present.sum(dtype=jnp.int32)


class TrainingSet(NamedTuple):
    """Pairs, and the responses that they index: rows of a table, or None for all rows."""

    pairs: Pairs
    ids: Int[Array, "U"] | None

    def rows(self, table: Float[Array, "N d"]) -> Float[Array, "U d"]:
        """Embeddings of the responses."""
        return table if self.ids is None else table[self.ids]

    def narrow(self, capacity: int) -> TrainingSet:
        """The same with room for fewer responses; those in use come first."""
        return self if self.ids is None else self._replace(ids=self.ids[..., :capacity])


@dataclasses.dataclass(frozen=True)
class FitParts:
    """The static parts of a fit.

    Attributes:
      head: the reward head.
      config: how it is fitted.
      sequential: whether members are fitted one after the other, by `lax.map`; else together, by `vmap`.
    """

    head: RewardHead
    config: FitConfig
    sequential: bool

    def over_members(self, f: Callable[[Any], Any], xs: Any) -> Any:
        """Map a function over the leading axis of a pytree."""
        return jax.lax.map(f, xs) if self.sequential else jax.vmap(f)(xs)


class FitProblem(NamedTuple):
    """K members to fit to labelled pairs.

    Attributes:
      hparams: numbers of the fit.
      starts: parameters to start from, with a leading axis K.
      embeddings: `[N, d]`, one row per response.
      pairs: the labelled pairs, with their weights.
      weights: `[K, L]` weights of the pairs for each member.
    """

    hparams: HParams
    starts: Params
    embeddings: Float[Array, "N d"]
    pairs: Pairs
    weights: Float[Array, "K L"]


def pair_loss(kind: str, first: Float[Array, "*l"], second: Float[Array, "*l"], label: Float[Array, "*l"]) -> Array:
    """Elementwise loss of pairs, given the rewards of their ends."""
    return classification(first, second, label) if kind == "classification" else bradley_terry(first - second, label)


def weighted_mean(losses: Float[Array, "L"], weight: Float[Array, "L"]) -> Float[Array, ""]:
    """Weighted mean; 0 where all weights are 0."""
    return jnp.vdot(losses, weight) / jnp.maximum(weight.sum(), jnp.finfo(jnp.float32).tiny)


MAX_CAPACITIES = 9
"""Capacities that a step is compiled for at most, half a second each: one for each fit of the default protocol."""


@jax.custom_batching.custom_vmap
def _same_for_all(index: Int[Array, ""]) -> Int[Array, ""]:
    return index


@_same_for_all.def_vmap
def _(axis_size: int, in_batched: list[bool], index: Int[Array, "V"]) -> tuple[Int[Array, ""], bool]:
    return index.max(), False


def smallest_capacity(branch: bool, f: Callable[..., Any], *needs: tuple[int, Int[Array, ""]]) -> Any:
    """Compile a step for a few capacities and branch to the smallest that holds the data.

    Args:
      branch: whether to branch at all; else f gets the full capacities.
      f: function of one capacity for each of `needs`; its result has the same shapes for all of them.
      needs: full capacity, a static int; and how much of it is in use, a traced scalar.
    """
    largest = max(capacity for capacity, _ in needs)
    count = min(MAX_CAPACITIES, largest // 64) if branch else 1
    sizes = [tuple(-(-capacity * i // count) for capacity, _ in needs) for i in range(1, count + 1)]
    if len(sizes) < 2:
        return f(*(capacity for capacity, _ in needs))
    enough = jnp.stack([jnp.asarray(size) for size in sizes]) >= jnp.stack([used for _, used in needs])[None, :]
    # Under vmap the largest index serves all. With an index for each, XLA runs every branch and selects: 21 times the
    # processor time for 4 seeds with 100 labels at a capacity of 450.
    index = _same_for_all(jnp.argmax(enough.all(axis=1)))
    return jax.lax.switch(index, [functools.partial(f, *size) for size in sizes])
