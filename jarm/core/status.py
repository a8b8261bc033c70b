"""Failure as data: a `Status` travels with each result; `check` raises it at the edge, as a sentence with the cure."""

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jarm.core.types import Array, Int


class Status(enum.IntEnum):
    """Outcome of a computation, from harmless to worst, so that statuses combine by `max` (see `worst`).

    First a batch that is short or of little use, then a full budget, then numbers that failed, then a broken rule.
    """

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
        """The fault and its cure."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.OK: "All is well.",
    Status.EXHAUSTED: (
        "The pair space holds fewer unlabelled pairs than the batch asks for: label fewer pairs per round, "
        "run fewer rounds, or widen the space (`--pairs all`)."
    ),
    Status.LIMITED: (
        "The limits on pairs per prompt, pairs per response or near-copies leave fewer pairs than the batch asks for: "
        "raise them, label fewer pairs, or draw more candidates (`--candidates`)."
    ),
    Status.UNINFORMATIVE: (
        "Some pairs of the batch would teach nothing, because every remaining pair has equal features at both ends: "
        "check the features for copies or a head that has collapsed, or label fewer pairs."
    ),
    Status.FULL: "More labels were recorded than the budget has room for: configure more rounds or a larger batch.",
    Status.SINGULAR: (
        "An information matrix is not positive definite in float32: raise the prior of the rule (`--prior-weight`, "
        "where it has one) or the penalty of a linear head (`--ridge`), lower the prior variance of a laplace head "
        "(`--prior-variance`), or check the features for an exploding direction."
    ),
    Status.DIVERGED: "The fit of a reward head ended at a loss that is not finite: lower the learning rate.",
    Status.NONFINITE: (
        "Rewards, gold rewards or features are missing, NaN or infinite, or a label is not in [0, 1]: check the "
        "embeddings and the labels, then lower the learning rate. Without gold rewards, call `init`, `ask` and `tell`."
    ),
    Status.BROKEN_RULE: (
        "A rule returned a pair twice, a pair that is not in its space or has the larger index first, or fewer pairs "
        "than there are: `jarm rules --check` says which."
    ),
    Status.BROKEN_SCORES: (
        "A rule made a score, a gain or a weight that is NaN or infinite, or a weight that is not positive, from "
        "finite numbers: `jarm rules --check` says where."
    ),
    Status.NO_RULE: "The index of the rule is not one of `LoopConfig.rules`: count them from 0.",
}


# Controls (C0, DEL, C1), signs that turn the direction of writing, line and paragraph separators, and lone surrogates.
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    r"""A text as one line that a terminal shows and does not obey; all other Unicode stays as it is.

    Control characters, signs that turn the direction of writing, line separators and lone surrogates are escaped as in
    a Python literal.

    Example:
      >>> print(printable("müde \x1b[31m\n\u202egnp.exe"))
      müde \x1b[31m\n\u202egnp.exe
    """
    return _HIDDEN.sub(lambda found: repr(found[0])[1:-1], str(text))


class JarmError(ValueError):
    """An input of the user, or a computation on it, is wrong; the message says what, where, and what to do."""

    def __str__(self) -> str:
        """The message, with control characters of the input escaped: a terminal shows it, and does not obey it."""
        return printable(super().__str__())


def worst(*statuses: Int[Array, ""]) -> Int[Array, ""]:
    """The worst of several statuses."""
    import jax.numpy as jnp  # here, so that messages, and help on the command line, do without it

    return jnp.stack([jnp.asarray(status, jnp.int32) for status in statuses]).max()


def check(status: Int[Array, "..."] | np.ndarray | int, where: str = "") -> None:
    """Raise the message of the worst status; do nothing if all are OK.

    Args:
      status: statuses of any shape; this waits for their computation.
      where: beginning of the message, such as `round 3`.

    Raises:
      JarmError: a status is not OK.

    Example:
      >>> from jarm import Status, check
      >>> check(np.array([Status.OK, Status.OK]))
      >>> check(np.array([Status.OK, Status.DIVERGED]), "round 3")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      jarm.core.status.JarmError: round 3: The fit of a reward head ended at a loss that is not finite: lower ...
    """
    found = Status(int(np.max(np.asarray(status))))
    if found is not Status.OK:
        raise JarmError(f"{where}: {found.message}" if where else found.message)
