"""From results to stores: opening them, and committing rows every few megabytes or seconds."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jarm.core.files import refuse_link
from jarm.core.status import JarmError
from jarm.data.writer import StoreWriter
from jarm.embedding.extract import Corpus, Embedded

COMMIT_BYTES, COMMIT_SECONDS = 4 << 20, 5.0
"""Rows are committed once they fill this many bytes, or the first of them has waited this many seconds."""


def open_stores(
    stack: contextlib.ExitStack, made: Mapping[pathlib.Path, Mapping[str, Any]], width: int, dtype: str
) -> list[StoreWriter]:
    """Writers in the first process, none in the others; all processes stop if the first cannot open a store.

    Args:
      stack: closes the writers when it is left.
      made: store folder -> everything that decides its rows.
      width: d, numbers in a row.
      dtype: of the stores.

    Raises:
      JarmError: as `StoreWriter` in the first process; in the others, that the first failed.
    """
    writers: list[StoreWriter] = []
    failure = None
    try:
        for path, made_by in made.items() if jax.process_index() == 0 else ():
            if len(made) > 1:
                refuse_link(path)  # a folder that jarm names, within the one that was given
            writers.append(stack.enter_context(StoreWriter(path, width, made_by, dtype=dtype)))
    except JarmError as error:
        failure = error
    opened = failure is None
    if jax.process_count() > 1:
        opened = bool(np.all(multihost_utils.process_allgather(np.array(opened))))
    if failure is not None:
        raise failure
    if not opened:
        raise JarmError("Process 0 could not open the store, and says why: repair that and start all of them again.")
    return writers


class Sink:
    """Results on their way to stores, held until a few megabytes are together or a few seconds have passed.

    Attributes:
      corpus: all texts.
      writers: a store for each pooling; none in any process but the first.
      alike: rows with the same tokens as a row that is embedded, itself among them; they get its embedding.
    """

    def __init__(self, corpus: Corpus, writers: Sequence[StoreWriter], alike: Mapping[int, Sequence[int]]):
        self.corpus, self.writers, self.alike = corpus, writers, alike
        self._waiting: list[Embedded] = []
        self._since = time.monotonic()

    def add(self, result: Embedded) -> None:
        """Take a batch of results.

        Raises:
          JarmError: an embedding is NaN or infinite; the others of the batch are taken.
        """
        finite = np.all([np.isfinite(value).all(axis=1) for value in result.values], axis=0)
        self._waiting.append(result._replace(rows=result.rows[finite], values=[v[finite] for v in result.values]))
        if not finite.all():
            place = self.corpus.texts.places[int(result.rows[np.argmin(finite)])]
            raise JarmError(
                f"{place}: the embedding is NaN or infinite, as may happen in bfloat16 or with damaged weights: leave "
                "that text out, or run in --dtype float32 into another store."
            )
        size = sum(value.nbytes for each in self._waiting for value in each.values)
        if size >= COMMIT_BYTES or time.monotonic() - self._since >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Write the waiting rows; they are on disk when this returns."""
        waiting, self._waiting, self._since = self._waiting, [], time.monotonic()
        if not waiting:
            return
        groups = [self.alike[row] for each in waiting for row in each.rows.tolist()]
        keys = [self.corpus.keys[row] for group in groups for row in group]
        for at, writer in enumerate(self.writers):
            rows = np.concatenate([each.values[at] for each in waiting])
            writer.append(keys, np.repeat(rows, [len(group) for group in groups], axis=0))
