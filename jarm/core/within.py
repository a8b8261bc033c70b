"""Values less the mean of their prompt: what tells the responses to one prompt apart."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jarm.core.tables import ResponseTable, check_embeddings

CHUNK = 1 << 22
"""Numbers of a table's embeddings that are in memory at a time, in float64."""
MAX_WIDTH = 4096
"""Widest embeddings that are decomposed: that takes d^3 steps and three d x d arrays of float64."""


def centred(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Values less the mean of their prompt, float64; 0 where `mask` is false.

    Args:
      values: `[p, R]` or `[p, R, d]`, 0 where `mask` is false.
      mask: `[p, R]`, true where a response exists.

    Example:
      >>> centred(np.array([[1.0, 3.0, 0.0]]), np.array([[True, True, False]]))
      array([[-1.,  1.,  0.]])
    """
    rows, real = values.astype(np.float64), mask.reshape(*mask.shape, *[1] * (values.ndim - 2))
    mean = rows.sum(axis=1, keepdims=True) / np.maximum(real.sum(axis=1, keepdims=True), 1)
    return np.where(real, rows - mean, 0)


def centred_embeddings(table: ResponseTable) -> Iterator[tuple[slice, np.ndarray]]:
    """Some prompts after the other, and their embeddings less the mean of their prompt, `[p, R, d]` float64.

    Raises:
      JarmError: an embedding is not finite, or too large.
    """
    prompts, responses, width = table.shape
    step = max(1, CHUNK // (responses * max(responses, width)))
    for start in range(0, prompts, step):
        some = slice(start, start + step)
        embeddings, mask = table.embeddings(some), table.mask[some]
        check_embeddings(embeddings, mask, start)
        yield some, centred(embeddings, mask)
