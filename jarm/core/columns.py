"""Columns of a table: whether their values differ, and how they reach a device that computes in float32 without ties.

Float32 keeps seven digits of a value, not of a difference: 16777216 and 16777217 are one number to it, as are rewards
that differ by .001 beside a million. So a column leaves the host as two halves, whose differences add up to that of the
float64 values, and ranks are counted before.
"""

from __future__ import annotations

import numpy as np

from jarm.core.status import JarmError
from jarm.core.types import Array, Int

SPACES = {"within": "within prompts", "cross": "across prompts", "all": "of responses"}
"""Kinds of pairs, in words."""


def halves(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two float32 arrays that add up to float64 values: the nearest numbers, and what they lack; 0 beside infinities.

    Example:
      >>> [each.tolist() for each in halves(np.array([16777216.0, 16777217.0]))]
      [[16777216.0, 16777216.0], [0.0, 1.0]]
    """
    values = np.asarray(values, np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        near = values.astype(np.float32)
        rest = (values - near).astype(np.float32)
    return near, np.where(np.isfinite(near), rest, np.float32(0))


def smallest(values: np.ndarray) -> np.ndarray:
    """Values as float32 where that loses nothing, else as float64.

    Example:
      >>> smallest(np.array([0.5, 2.0])).dtype, smallest(np.array([0.1])).dtype
      (dtype('float32'), dtype('float64'))
    """
    with np.errstate(over="ignore"):
        near = values.astype(np.float32)
    return near if np.array_equal(near, values, equal_nan=True) else np.asarray(values, np.float64)


def difference(values: Array, first: Int[Array, "..."], second: Int[Array, "..."]) -> Array:
    """Values of some rows minus those of others.

    Args:
      values: `[N]`, or `[N, 2]`, the two halves.
      first, second: rows.
    """
    gap = values[first] - values[second]
    return gap if values.ndim == 1 else gap[..., 0] + gap[..., 1]


def dense_ranks(values: np.ndarray) -> np.ndarray:
    """How many distinct values of its row are less than each, `[P, R]` float32; NaN for a NaN.

    Example:
      >>> dense_ranks(np.array([[5.0, 1e9, 1e9 + 1e-6, 5.0]]))
      array([[0., 1., 2., 0.]], dtype=float32)
    """
    values = np.asarray(values, np.float64)
    order = np.argsort(values, axis=1)
    ordered = np.take_along_axis(values, order, axis=1)
    counts = np.cumsum(np.diff(ordered, axis=1, prepend=ordered[:, :1]) != 0, axis=1)
    ranks = np.empty(values.shape, np.float32)
    np.put_along_axis(ranks, order, counts.astype(np.float32), axis=1)
    return np.where(np.isnan(values), np.float32(np.nan), ranks)


def nearest_zero(values: np.ndarray) -> float:
    """The finite value of smallest magnitude, 0 where none is finite: differences from it are no larger than values.

    Measured from a mean or a median, a score of -1e9 for a response that failed would leave few digits to the others.
    """
    finite = values[np.isfinite(values)]
    return float(finite[np.argmin(np.abs(finite))]) if finite.size else 0.0


def words_for(column: str) -> str:
    """Values of a column, in words."""
    return "gold rewards" if column == "gold" else f"values of {column!r}"


def differ(values: np.ndarray, mask: np.ndarray, pairs: str) -> bool:
    """Whether the values of `[P, R]` differ in some pair.

    Example:
      >>> values, mask = np.array([[1.0, 1.0], [2.0, 2.0]]), np.ones((2, 2), bool)
      >>> differ(values, mask, "within"), differ(values, mask, "cross")
      (False, True)
    """
    values, real = np.asarray(values), mask.any(axis=1)
    if pairs != "within":  # of two different values in one prompt, any of another prompt differs from one
        return bool(np.ptp(values[mask]) > 0 and (pairs == "all" or real.sum() > 1))
    first = values[np.arange(len(mask)), mask.argmax(axis=1)]
    return bool(((values != first[:, None]) & mask).any())


def refuse_ties(values: np.ndarray, mask: np.ndarray, pairs: str, column: str = "gold", where: str = "") -> None:
    """Refuse a column that is equal in every pair of a space, by which nothing can be preferred.

    Args:
      values, mask: `[P, R]`.
      pairs: kind of the pair space.
      column: name of the column.
      where: what the values are of, such as ` of the test prompts`.

    Raises:
      JarmError: no pair differs.
    """
    if not differ(values, mask, pairs):
        raise JarmError(
            f"The {words_for(column)}{where} are equal in every pair {SPACES[pairs]}: there is nothing to prefer; give "
            "another column, or responses with different values."
        )
