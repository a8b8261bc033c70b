"""What a head is trained on: weighted pairs, and the responses at their ends, each scored once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp

from jarm.core.types import Array, Float, Int
from jarm.reward.losses import bradley_terry, classification


class Pairs(NamedTuple):
    """Weighted pairs, as indices into some rows of embeddings."""

    first: Int[Array, "L"]
    second: Int[Array, "L"]
    label: Float[Array, "L"]
    weight: Float[Array, "L"]

    def mean_loss(self, kind: str, rewards: Float[Array, "U"]) -> Float[Array, ""]:
        """Weighted mean loss, given the rewards of the rows."""
        return weighted_mean(pair_loss(kind, rewards[self.first], rewards[self.second], self.label), self.weight)

    def take(self, at: Int[Array, "B"]) -> Task:
        """Some of the pairs, on the responses at their ends; an index beyond them is of one that weighs nothing."""
        ends = jnp.concatenate([self.first[at], self.second[at]])
        places = jnp.arange(len(ends), dtype=jnp.int32).reshape(2, -1)
        weight = self.weight.at[at].get(mode="fill", fill_value=0.0)
        return Task(Pairs(places[0], places[1], self.label[at], weight), ends)

    def compact(self, n: int, most: int) -> tuple[Task, Int[Array, ""]]:
        """The pairs on those of n responses that they weigh, each once and `most` at most, and how many these are."""
        used = (self.weight > 0)[None, :]
        ends = jnp.where(used, jnp.stack([self.first, self.second]), n)
        present = jnp.zeros(n, bool).at[ends].set(True, mode="drop")
        place = jnp.cumsum(present, dtype=jnp.int32) - 1
        responses = jnp.arange(n, dtype=jnp.int32)
        ids = jnp.zeros(most, jnp.int32).at[jnp.where(present, place, most)].set(responses, mode="drop")
        first, second = jnp.where(used, place[ends.clip(max=n - 1)], 0)
        return Task(self._replace(first=first, second=second), ids), present.sum(dtype=jnp.int32)


class Task(NamedTuple):
    """Pairs, and the responses that they index, themselves rows of a table; None for all of it."""

    pairs: Pairs
    ids: Int[Array, "U"] | None

    def rows(self, table: Float[Array, "N d"]) -> Float[Array, "U d"]:
        """Embeddings of the responses."""
        return table if self.ids is None else table[self.ids]

    def narrow(self, size: int) -> Task:
        """Room for fewer responses, that hold all those used."""
        return self if self.ids is None else self._replace(ids=self.ids[..., :size])


def pair_loss(kind: str, first: Float[Array, "*l"], second: Float[Array, "*l"], label: Float[Array, "*l"]) -> Array:
    """Elementwise loss of pairs, given the rewards of their ends."""
    return classification(first, second, label) if kind == "classification" else bradley_terry(first - second, label)


def weighted_mean(losses: Float[Array, "L"], weight: Float[Array, "L"]) -> Float[Array, ""]:
    """Weighted mean; 0 where nothing weighs anything."""
    return jnp.vdot(losses, weight) / jnp.maximum(weight.sum(), jnp.finfo(jnp.float32).tiny)


def _over(in_turn: bool, f: Callable[[Any], Any], xs: Any) -> Any:
    return jax.lax.map(f, xs) if in_turn else jax.vmap(f)(xs)


SIZES = 9
"""Most sizes that a step is compiled for, half a second each: as many as the default protocol has fits."""


@jax.custom_batching.custom_vmap
def _for_all(index: Int[Array, ""]) -> Int[Array, ""]:
    """The largest index of a batch, under vmap: with one for each, all branches would run."""
    return index


@_for_all.def_vmap
def _(axis_size: int, in_batched: list[bool], index: Int[Array, "V"]) -> tuple[Int[Array, ""], bool]:
    return index.max(), False


def smallest(may: bool, f: Callable[..., Any], *needs: tuple[int, Int[Array, ""]]) -> Any:
    """Call f with sizes that hold what is needed of each capacity: it is compiled for a few, and one is branched to.

    Args:
      may: whether to branch at all; else f gets the capacities.
      f: of one size for each of `needs`; what it returns must have the same shapes for all of them.
      needs: capacity, known before it runs, and how much of it is needed, known when it does.
    """
    most = max(capacity for capacity, _ in needs)
    count = min(SIZES, most // 64) if may else 1
    sizes = [tuple(-(-capacity * i // count) for capacity, _ in needs) for i in range(1, count + 1)]
    if len(sizes) < 2:
        return f(*(capacity for capacity, _ in needs))
    enough = jnp.stack([jnp.asarray(size) for size in sizes]) >= jnp.stack([need for _, need in needs])[None, :]
    return jax.lax.switch(_for_all(jnp.argmax(enough.all(axis=1))), [functools.partial(f, *size) for size in sizes])
