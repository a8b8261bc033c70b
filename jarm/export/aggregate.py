"""One reward of the members of an ensemble: their mean, or a more cautious number."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jarm.core.checks import between
from jarm.core.messages import nearest
from jarm.core.status import JarmError
from jarm.core.types import Float

KINDS = ("mean", "worst", "lower", "quantile")


class Aggregate(NamedTuple):
    """How the rewards of members become one.

    Attributes:
      kind: `mean`, `worst` (the smallest), `lower` (mean less `number` standard deviations) or `quantile`.
      number: c of `lower`, or the level of `quantile`; 0 for the others.
    """

    kind: str = "mean"
    number: float = 0.0

    def __str__(self) -> str:
        return self.kind if self.kind in ("mean", "worst") else f"{self.kind}:{self.number:g}"

    def __call__(self, rewards: Float[np.ndarray, "K n"]) -> Float[np.ndarray, "n"]:
        """One reward per response.

        Example:
          >>> read_aggregate("lower:1")(np.array([[1.0, 4.0], [3.0, 4.0]]))
          array([1., 4.])
        """
        if self.kind == "mean":
            return rewards.mean(axis=0)
        if self.kind == "worst":
            return rewards.min(axis=0)
        if self.kind == "quantile":
            return np.quantile(rewards, self.number, axis=0).astype(rewards.dtype)
        return (rewards.mean(axis=0) - self.number * rewards.std(axis=0)).astype(rewards.dtype)


MEAN = Aggregate()
"""The mean over members."""


def read_aggregate(text: str) -> Aggregate:
    """Read `mean`, `worst`, `lower:C` or `quantile:LEVEL`.

    Raises:
      JarmError: the text is none of these, or its number is out of range.

    Example:
      >>> read_aggregate("quantile:0.25")
      Aggregate(kind='quantile', number=0.25)
      >>> read_aggregate("average")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      jarm.core.status.JarmError: Cannot read the aggregate 'average': write 'mean', 'worst', 'lower:1' or ...
    """
    kind, colon, rest = str(text).partition(":")
    try:
        number = float(rest) if colon else 0.0
    except ValueError:
        kind = ""
    if kind not in KINDS or bool(colon) != (kind in ("lower", "quantile")):
        raise JarmError(
            f"Cannot read the aggregate '{text}'{nearest(kind, KINDS)}: write 'mean', 'worst', 'lower:1' or "
            "'quantile:0.25'."
        )
    between(0, 1 if kind == "quantile" else 1e6)(f"The number of the aggregate '{text}'", number)
    return Aggregate(kind, number)
