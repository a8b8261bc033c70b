"""Where the embeddings of texts lie: in an array of their order, or in a store by the hash of each text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jarm.core.files import PathLike
from jarm.core.messages import listed
from jarm.core.status import JarmError
from jarm.data.journal import is_store
from jarm.data.readers import open_npy
from jarm.data.store import EmbeddingStore
from jarm.data.texts import Texts


def open_embeddings(path: PathLike) -> Any:
    """An `EmbeddingStore`, where the path is the folder of one, or else the array of an `.npy`, memory-mapped.

    Raises:
      JarmError: it is neither, or damaged.
    """
    return EmbeddingStore(path) if is_store(Path(path)) else open_npy(path)


def stored_rows(store: EmbeddingStore, keys: Iterable[str], name: str, place: Callable[[int], str]) -> np.ndarray:
    """`[n]` row of the store of each key of a table's texts.

    Args:
      store: the store.
      keys: key of each text.
      name: the table, for messages.
      place: place of a text in it, for messages.

    Raises:
      JarmError: the store lacks texts; the message names the first.
    """
    rows = store.indices(keys)
    missing = np.flatnonzero(rows < 0)
    if missing.size:
        raise JarmError(
            f"{store.path} lacks the texts of {missing.size:,} of the {len(rows):,} responses of {name}, "
            f"{listed(missing, place=place)}: embed the table into it."
        )
    return rows


def rows_of_texts(name: str, texts: Texts, store: Any, embeddings: PathLike) -> np.ndarray:
    """`[n]` row of the embedding of each text.

    Args:
      name: the table, for messages.
      texts: its texts.
      store: an `EmbeddingStore`, or an array `[n, d]` in the order of the texts.
      embeddings: where it came from, for messages.

    Raises:
      JarmError: an array of another length, or a store that lacks texts.
    """
    count = len(texts.places)
    if not isinstance(store, EmbeddingStore):
        if store.ndim != 2 or len(store) != count:
            raise JarmError(
                f"{embeddings} has shape {store.shape}, and {name} has {count:,} responses ({texts.layout}): give one "
                "row for each response, those of one row of the table one behind the other."
            )
        return np.arange(count)
    return stored_rows(store, texts.keys(store.template), name, texts.places.__getitem__)
