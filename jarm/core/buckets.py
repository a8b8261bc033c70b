"""Sizes that users vary, rounded up to a few, so that a loop of any sizes compiles a few programs once."""

from __future__ import annotations

from typing import Any

import numpy as np


def bucket(count: int, *, per_octave: int = 1) -> int:
    """The smallest of a geometric series of sizes that is at least `count`.

    Args:
      count: a size, 0 or more.
      per_octave: sizes from a power of two to the next: 1, 2 or 4; more waste less room and share fewer programs.

    Example:
      >>> [bucket(count) for count in (0, 1, 5, 8, 9, 300)]
      [0, 1, 8, 8, 16, 512]
      >>> [bucket(count, per_octave=4) for count in (5, 9, 17, 300)]
      [5, 10, 20, 320]
    """
    unit = 1 << max(0, (count - 1).bit_length() - per_octave.bit_length()) if count else 1
    return -(-count // unit) * unit


def padded(values: np.ndarray, size: int, fill: Any = 0) -> np.ndarray:
    """An array `[n, ...]` with rows of `fill` at its end, `[size, ...]`; itself where there are none to add.

    Example:
      >>> padded(np.arange(3), 5, -1).tolist()
      [0, 1, 2, -1, -1]
    """
    if len(values) == size:
        return values
    made = np.full((size, *values.shape[1:]), fill, values.dtype)
    made[: len(values)] = values
    return made
