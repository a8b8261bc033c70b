"""Word counts of columns of texts, compared."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

COSINE_ROWS = 4096
"""Pairs of texts whose words are counted at a time."""


def bag_cosine(first: pa.ChunkedArray, second: pa.ChunkedArray) -> np.ndarray:
    """Cosine of the word counts of two columns of texts, `[n]` float32; 0 where either text has no words.

    Words are runs of letters and digits, in lower case.

    Example:
      >>> first, second = pa.chunked_array([["Say a!"]]), pa.chunked_array([["say A, a"]])
      >>> bag_cosine(first, second)  # say 1, a 1 against say 1, a 2: 3 / sqrt(2 * 5)
      array([0.9486833], dtype=float32)
    """
    parts = [
        _bag_cosine(first.slice(at, COSINE_ROWS), second.slice(at, COSINE_ROWS))
        for at in range(0, len(first), COSINE_ROWS)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _bag_cosine(first: pa.ChunkedArray, second: pa.ChunkedArray) -> np.ndarray:
    n = len(first)
    texts = pa.concat_arrays([*first.cast(pa.large_string()).chunks, *second.cast(pa.large_string()).chunks])
    words = pc.split_pattern_regex(pc.utf8_lower(pc.fill_null(texts, "")), r"[^\pL\pN]+")
    text, word = np.asarray(pc.list_parent_indices(words)), pc.list_flatten(words)
    filled = np.asarray(pc.not_equal(word, ""))
    codes = pc.dictionary_encode(word)
    V = len(codes.dictionary)
    cells, counts = np.unique(text[filled] * V + np.asarray(codes.indices)[filled], return_counts=True)
    squares = np.bincount(cells // V, counts.astype(np.float64) ** 2, minlength=2 * n)
    split = np.searchsorted(cells, n * V)
    _, at_first, at_second = np.intersect1d(
        cells[:split], cells[split:] - n * V, assume_unique=True, return_indices=True
    )
    products = counts[:split][at_first] * counts[split:][at_second]
    dots = np.bincount(cells[:split][at_first] // V, products, minlength=n)
    norms = np.sqrt(squares[:n] * squares[n:])
    return np.divide(dots, norms, out=np.zeros(n), where=norms > 0).astype(np.float32)
