"""Failure as data: a `Status` travels with each result; `check` raises it at the edge, with a sentence and its cure."""

from __future__ import annotations

import enum

import jax.numpy as jnp
import numpy as np

from jarm.core.types import Array, Int


class Status(enum.IntEnum):
    """What went wrong, from harmless to worst, so that statuses combine by `max`. `message` names the cure."""

    OK = 0
    EXHAUSTED = 1
    LIMITED = 2
    UNINFORMATIVE = 3
    FULL = 4
    SINGULAR = 5
    DIVERGED = 6
    NONFINITE = 7
    BROKEN_RULE = 8
    BROKEN_SCORES = 9
    NO_RULE = 10

    @property
    def message(self) -> str:
        """One sentence: what is wrong, and what to do."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.OK: "All is well.",
    Status.EXHAUSTED: (
        "The pair space holds fewer unlabelled pairs than the batch asks for: label fewer pairs per round, "
        "run fewer rounds, or widen the space (`--pairs all`)."
    ),
    Status.SINGULAR: (
        "An information matrix is not positive definite in float32: raise the prior of the rule (`--prior-weight`, "
        "where it has one) or the penalty of a linear head (`--ridge`), or check the features for an exploding "
        "direction."
    ),
    Status.DIVERGED: "The fit of a reward head ended at a loss that is not finite: lower the learning rate.",
    Status.NONFINITE: (
        "Rewards, gold rewards or features are missing, NaN or infinite, or a label is not in [0, 1]: check the "
        "embeddings and the labels (without gold rewards, call `init`, `ask` and `tell`), then lower the learning rate."
    ),
    Status.NO_RULE: "The index of the rule is not one of `LoopConfig.rules`: count them from 0.",
    Status.LIMITED: (
        "The limits on picks a prompt, picks a response or near-copies leave fewer pairs than the batch asks for: "
        "raise them, or label fewer pairs."
    ),
    Status.UNINFORMATIVE: (
        "Some pairs of the batch would teach nothing, because every pair that is left has equal features at both ends: "
        "check the features for copies or a head that has collapsed, or label fewer pairs."
    ),
    Status.BROKEN_RULE: (
        "A rule returned a pair twice, one that is not in its space or has the larger index first, or fewer pairs than "
        "there are: `jarm rules --check` says which."
    ),
    Status.BROKEN_SCORES: (
        "A rule made a score, a gain or a weight that is NaN or infinite, or a weight that is not positive, of numbers "
        "that are finite: `jarm rules --check` says where."
    ),
    Status.FULL: "More answers were told than the budget has room for: configure more rounds or a larger batch.",
}


class JarmError(ValueError):
    """Something the user gave, or a computation on it, is wrong; the message says where and what to do."""


def check(status: Int[Array, "..."] | np.ndarray | int, where: str = "") -> None:
    """Raise `JarmError` with the message of the worst status; do nothing if all are OK."""
    worst = Status(int(np.max(np.asarray(status))))
    if worst is not Status.OK:
        raise JarmError(f"{where}: {worst.message}" if where else worst.message)


def worst(*statuses: Int[Array, ""]) -> Int[Array, ""]:
    """The worst of several statuses."""
    return jnp.stack([jnp.asarray(status, jnp.int32) for status in statuses]).max()
