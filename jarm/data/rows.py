"""Where the embeddings of texts lie: in an array of their order, or in a store by the hash of each text."""

from __future__ import annotations

from typing import Any

import numpy as np

from jarm.core.files import PathLike
from jarm.core.messages import listed
from jarm.core.status import JarmError
from jarm.data.store import EmbeddingStore
from jarm.data.texts import Texts


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
    rows = store.indices(texts.keys(store.template))
    missing = np.flatnonzero(rows < 0)
    if missing.size:
        raise JarmError(
            f"{store.path} lacks the texts of {missing.size:,} of the {count:,} responses of {name}, "
            f"{listed(missing, place=lambda at: texts.places[at])}: embed the table into it."
        )
    return rows
