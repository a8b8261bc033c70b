"""Pairs on record as the pool of a loop: no other pair is on offer, and their labels are the answers."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jarm.core.base import PairSpace
from jarm.core.pytree import record
from jarm.core.status import JarmError
from jarm.core.types import Array, Bool, Float, Int
from jarm.design.spaces import as_list, exclude, find, pair_space
from jarm.loop.config import LoopConfig


@record
class RecordedPairs:
    """Pairs within prompts that somebody has labelled.

    Attributes:
      pairs: `[M, 2]` int32 response indices, smaller index first, distinct, in lexicographic order.
      label: `[M]` float32, the probability, or share of votes, that the first is preferred.
    """

    pairs: Int[Array, "M 2"]
    label: Float[Array, "M"]


def merged_pairs(
    first: Int[np.ndarray, "m"], second: Int[np.ndarray, "m"], label: Float[np.ndarray, "m"]
) -> tuple[Int[np.ndarray, "M 2"], Float[np.ndarray, "M"]]:
    """Each pair once, smaller index first, in lexicographic order, with the mean of its labels.

    Args:
      first, second: `[m]` response indices; a pair may occur several times, in either order.
      label: `[m]` probability that `first` is preferred.

    Returns:
      `[M, 2]` int32 pairs, and `[M]` float32 probabilities that the first of each is preferred.

    Example:
      >>> pairs, label = merged_pairs(np.array([4, 2, 5]), np.array([2, 4, 6]), np.array([1.0, 0.5, 0.0]))
      >>> pairs.tolist(), label.tolist()  # of the first pair, 2 is preferred with 0 and with .5
      ([[2, 4], [5, 6]], [0.25, 0.0])
    """
    ends = np.stack([first, second], axis=1)
    turned = np.where(first < second, label, 1 - label)
    pairs, of = np.unique(np.sort(ends, axis=1), axis=0, return_inverse=True)
    of = of.reshape(-1)
    mean = np.bincount(of, turned, minlength=len(pairs)) / np.bincount(of, minlength=len(pairs))
    return pairs.astype(np.int32), mean.astype(np.float32)


def check_recorded(config: LoopConfig, counts: Int[np.ndarray, "P"]) -> None:
    """Refuse a loop that the pairs on record cannot serve.

    Args:
      config: the shape of a run.
      counts: `[P]` number of recorded pairs of each prompt.

    Raises:
      JarmError: pairs are not within prompts or prompts are drawn, there are fewer pairs than labels, or a limit of
        pairs per prompt leaves too few for a batch.

    Example:
      >>> check_recorded(LoopConfig(rounds=1, batch=5, initial=5), np.full(4, 2))
      Traceback (most recent call last):
      jarm.core.status.JarmError: There are 8 recorded pairs to ask about, fewer than the 10 labels of 5 + 1 x 5: ...
    """
    if config.pairs != "within" or config.prompts is not None:
        raise JarmError("Recorded pairs are within prompts, and all are on offer: leave `pairs` and `prompts` out.")
    if (total := int(counts.sum())) < config.budget:
        raise JarmError(
            f"There are {total:,} recorded pairs to ask about, fewer than the {config.budget:,} labels of "
            f"{config.initial} + {config.rounds} x {config.batch}: take fewer (`--rounds`, `--batch`, `--initial`)."
        )
    if config.per_prompt is None:
        return
    room = int(np.minimum(counts, config.per_prompt).sum())
    for name, size in {"batch": config.batch, "first batch": config.initial * (config.first != "random")}.items():
        if room < size:
            raise JarmError(
                f"At most {config.per_prompt} per prompt are {room} recorded pairs, fewer than the {name} of {size}: "
                "raise the limit (`--per-prompt`), or label fewer at a time."
            )


def recorded_space(
    recorded: RecordedPairs, mask: Bool[Array, "P R"], labelled: Int[Array, "L 2"] | None = None
) -> PairSpace:
    """The pairs on record as a listed space, without those labelled so far.

    Args:
      recorded: the pairs.
      mask: `[P, R]`, true where a response exists.
      labelled: `[L, 2]` response indices in any order; rows with an index of `P R` or more are padding.

    Example:
      >>> recorded = RecordedPairs(jnp.array([[0, 1], [2, 3]]), jnp.ones(2))
      >>> recorded_space(recorded, jnp.ones((2, 2), bool), jnp.array([[3, 2]])).pairs.tolist()  # 4: padding
      [[0, 1], [4, 4]]
    """
    space = as_list(pair_space("within", mask.shape[1], mask.reshape(-1)), recorded.pairs)
    return space if labelled is None else exclude(space, labelled)


def recorded_labels(recorded: RecordedPairs, pairs: Int[Array, "k 2"]) -> Float[Array, "k"]:
    """The labels on record of some pairs, smaller index first: `[k]` in [0, 1], NaN for a pair that has none.

    Example:
      >>> recorded = RecordedPairs(jnp.array([[0, 1], [2, 3]]), jnp.array([1.0, 0.25]))
      >>> recorded_labels(recorded, jnp.array([[2, 3], [0, 3]])).tolist()
      [0.25, nan]
    """
    place, found = find(recorded.pairs, pairs)
    return jnp.where(found, recorded.label[place], jnp.nan)
