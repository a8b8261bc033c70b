"""Rows of an array that are exactly equal, found without comparing each with each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

CHUNK = 1 << 22
"""Numbers hashed at once."""


def group_rows(rows: Callable[[slice], np.ndarray], count: int, width: int) -> np.ndarray | None:
    """The same number for equal rows.

    Rows are hashed in chunks, and those of equal hashes compared, so the answer is exact; -0 is 0.

    Args:
      rows: some of the rows, `[n, F]` of any float type, by their slice; the same each time.
      count: N, number of rows.
      width: F.

    Returns:
      `[N]` int32 in 0 .. N - 1, the first row that equals each; None where all rows differ.

    Example:
      >>> rows = np.array([[1.0, 2.0], [0.0, 1.0], [1.0, 2.0]])
      >>> group_rows(lambda part: rows[part], *rows.shape)
      array([0, 1, 0], dtype=int32)
      >>> group_rows(lambda part: rows[:2][part], 2, 2) is None
      True
    """
    step = max(1, CHUNK // max(1, width))
    hashes = np.empty(count, np.uint64)
    for start in range(0, count, step):
        hashes[start : start + step] = _hashes(rows(slice(start, min(start + step, count))))
    _, inverse, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
    if len(sizes) == count:
        return None
    first, found = np.arange(count, dtype=np.int32), dict[bytes, int]()
    for row in np.flatnonzero(sizes[inverse] > 1).tolist():
        first[row] = found.setdefault(_bits(rows(slice(row, row + 1))).tobytes(), row)
    return first if (first != np.arange(count)).any() else None


def count_alike(alike: np.ndarray, groups: np.ndarray, count: int = 0) -> np.ndarray:
    """Number of pairs of equal rows in each group.

    Args:
      alike: `[N]` the same whole number for equal rows.
      groups: `[N]` the group of each, from 0.
      count: number of groups, at least.

    Example:
      >>> count_alike(np.array([0, 0, 0, 3]), np.array([0, 0, 1, 1])).tolist()
      [1, 0]
    """
    number = int(alike.max()) + 1
    cells, sizes = np.unique(groups.astype(np.int64) * number + alike, return_counts=True)
    pairs = np.zeros(max(count, int(groups.max()) + 1), np.int64)
    np.add.at(pairs, cells // number, sizes.astype(np.int64) * (sizes - 1) // 2)
    return pairs


def _bits(rows: np.ndarray) -> np.ndarray:
    """Numbers as unsigned integers of their size, with one zero."""
    if rows.dtype.itemsize > 8:
        rows = rows.astype(np.float64)
    positive = np.ascontiguousarray(rows + rows.dtype.type(0))
    return positive.view(f"u{positive.dtype.itemsize}")


def _hashes(rows: np.ndarray) -> np.ndarray:
    """`[n]` uint64, equal for equal rows: a sum of products with odd numbers, modulo 2^64, of the bits."""
    bits = _bits(rows).astype(np.uint64)
    odd = np.random.default_rng(0).integers(1 << 63, size=(1, bits.shape[1]), dtype=np.uint64) | np.uint64(1)
    return np.asarray((bits * odd).sum(axis=1, dtype=np.uint64))
