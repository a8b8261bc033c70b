"""A job whose pool is the pairs on record of the training prompts, judged by those of other prompts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jarm.core.base import RewardHead
from jarm.core.types import Array, Float, Int, Params
from jarm.data.pairs import PairTable
from jarm.loop.device_table import DeviceTable
from jarm.loop.recorded import RecordedPairs, merged_pairs
from jarm.report.backtest import LONGER
from jarm.report.curves import ACCURACY
from jarm.report.held_out import by_prompt, pack, pair_metrics, right_of
from jarm.runs.jobs import Job
from jarm.runs.records import BY_PROMPT
from jarm.runs.results import Result
from jarm.studies.train import Training

MOST = 0.9
"""Share of the prompts above which it is said that they have one pair only."""
MAJORITY = "majority of the labels"
"""Name of the reference line of a model that knows the labels."""


class Pool(NamedTuple):
    """The pairs on offer, on the host.

    Attributes:
      pairs, label: as of `jarm.loop.recorded.RecordedPairs`.
      counts: `[P]` number of pairs of each prompt of the training table.
    """

    pairs: np.ndarray
    label: np.ndarray
    counts: np.ndarray


@dataclasses.dataclass(frozen=True)
class RecordedJob(Job):
    """Runs that ask about recorded pairs only, and get their recorded labels.

    Attributes:
      pool: the pairs on offer, in response indices of the training table.
      test: the pairs of held-out prompts, as arrays.
      longer: `[M]` of each of these, the difference of the lengths of its responses.
    """

    offers_all: ClassVar[bool] = False
    pool: Pool
    test: Training
    longer: np.ndarray

    @property
    def decided(self) -> np.ndarray:
        """`[P]` number of pairs with a majority of each held-out prompt that has any."""
        return by_prompt(np.zeros((1, len(self.test.label))), self.test.label, self.test.prompt)[1]

    @property
    def remark(self) -> str:
        """What the answer is about: the pool, and the pairs that models are judged by."""
        said = (
            f"The pool: {len(self.pool.pairs):,} recorded pairs of {np.count_nonzero(self.pool.counts):,} prompts; "
            f"judged by {len(self.test.label):,} pairs of {len(np.unique(self.test.prompt)):,} others."
        )
        return f"{_one_each(self.pool.counts)} {said}".lstrip()

    @property
    def reference_names(self) -> tuple[str, ...]:
        """Names of the lines of `references`."""
        return LONGER, MAJORITY

    def references(self, noise: float | None, linear: dict[int, dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
        """Accuracy of preferring the longer response, and of the majority of each pair's own labels: none is higher."""
        margins = np.stack([self.longer, self.test.label - 0.5]).astype(np.float64)
        values = pair_metrics(margins, self.test.label.astype(np.float64))[ACCURACY].tolist()
        return {name: {ACCURACY: value} for name, value in zip(self.reference_names, values, strict=True)}

    def device_table(self) -> DeviceTable:
        """The training table and the pool, on the device."""
        recorded = RecordedPairs(jnp.asarray(self.pool.pairs), jnp.asarray(self.pool.label))
        return dataclasses.replace(super().device_table(), recorded=recorded)

    def evaluate(self, results: Sequence[Result], pad: int) -> list[dict[str, np.ndarray]]:
        """Accuracy and loss of all heads of some runs on the held-out pairs; nobody knows which labels are wrong."""
        head, label, found = self.loop.head.head(), self.test.label.astype(np.float64), []
        ends = (jnp.asarray(each, jnp.int32) for each in (self.test.first, self.test.second))
        arrays = jnp.asarray(self.test.embeddings), *ends
        for result in results:
            margins = np.asarray(_margins(head, jax.tree.map(jnp.asarray, result.params), *arrays), np.float64)
            shares, _ = by_prompt(right_of(margins, label), label, self.test.prompt)
            packed = np.array([pack(each) for each in shares])
            unknown = np.full(len(margins), np.nan)
            found.append({**pair_metrics(margins, label), BY_PROMPT: packed, "label_error": unknown})
        return found


def _one_each(counts: np.ndarray) -> str:
    """A sentence where all prompts with a recorded pair, or nearly all, have one only; `[P]` pairs of each prompt."""
    single, prompts = int((counts == 1).sum()), np.count_nonzero(counts)
    if single == prompts:
        return (
            "Each training prompt has one recorded pair: nothing could be chosen within a prompt, only which prompts "
            "to ask about."
        )
    if single < MOST * prompts:
        return ""
    return (
        f"Of {prompts:,} training prompts {single:,} have one recorded pair: hardly anything could be chosen within a "
        "prompt, only which prompts to ask about."
    )


@functools.partial(jax.jit, static_argnames="head")
def _margins(
    head: RewardHead, params: Params, embeddings: Float[Array, "n r"], first: Int[Array, "M"], second: Int[Array, "M"]
) -> Float[Array, "H M"]:
    """Margins of H models, each the mean of K heads, in turn."""

    def one(members: Params) -> Float[Array, "M"]:
        rewards = jax.vmap(head.rewards, in_axes=(0, None))(members, embeddings).mean(axis=0)
        return rewards[first] - rewards[second]

    with jax.default_matmul_precision("highest"):
        return jax.lax.map(one, params)


def shuffled(pairs: PairTable, seed: int = 0) -> PairTable:
    """The pairs with the responses of each prompt in random order, so that no index tells which was preferred.

    Files have the chosen response before the rejected one, and a rule sees pairs in the order of their indices.

    Args:
      pairs: of a table whose responses stand before its padding.
      seed: of the order.

    Example:
      >>> from jarm.core.tables import ResponseTable
      >>> table = ResponseTable(np.eye(9), np.arange(9).reshape(3, 3), np.ones((3, 3), bool))
      >>> pairs = PairTable(table, np.array([0, 3]), np.array([2, 4]), np.ones(2, np.float32), np.arange(2))
      >>> moved = shuffled(pairs)
      >>> moved.table.rows.reshape(-1)[moved.first].tolist(), moved.table.rows.reshape(-1)[moved.second].tolist()
      ([0, 3], [2, 4])
    """
    table, width = pairs.table, pairs.table.rows.shape[1]
    ticket = np.where(table.mask, np.random.default_rng(seed).random(table.mask.shape), 2)
    order = np.argsort(ticket, axis=1, kind="stable")
    place = np.argsort(order, axis=1)

    def moved(ends: np.ndarray) -> np.ndarray:
        return ends // width * width + place.reshape(-1)[ends]

    return dataclasses.replace(
        pairs, table=table.reordered(order), first=moved(pairs.first), second=moved(pairs.second)
    )


def pool_of(pairs: PairTable) -> Pool:
    """The distinct pairs of a table, repeated ones with their mean label.

    Example:
      >>> from jarm.core.tables import ResponseTable
      >>> table = ResponseTable(np.eye(4), np.arange(4).reshape(2, 2), np.ones((2, 2), bool))
      >>> twice = PairTable(table, np.array([0, 1]), np.array([1, 0]), np.array([1, 0.5], np.float32), np.arange(2))
      >>> pool_of(twice)
      Pool(pairs=array([[0, 1]], dtype=int32), label=array([0.75], dtype=float32), counts=array([1, 0]))
    """
    ends, label = merged_pairs(pairs.first, pairs.second, pairs.label)
    count, width = pairs.table.mask.shape
    return Pool(ends, label, np.bincount(ends[:, 0] // width, minlength=count))
