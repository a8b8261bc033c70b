"""Tables of responses: prompts, their responses as rows of one embedding array, and named columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jarm.core.status import JarmError


@dataclasses.dataclass(frozen=True)
class ResponseTable:
    """P prompts with R responses each, as rows of one embedding array that may lie on disk.

    Responses are indices into `store`, so that a ragged table, a split of a table, or a store in which equal texts
    share a row all cost no copy. A table lives on the host; `embeddings` gathers only the prompts asked for.

    Example:
      >>> rows = np.array([[0, 1], [2, 0]])  # two prompts with two responses, of which two share an embedding
      >>> table = ResponseTable(np.eye(3), rows, np.ones((2, 2), bool), gold=np.zeros((2, 2), np.float32))
      >>> table.shape, table.take(np.array([1])).embeddings()
      ((2, 2, 3), array([[[0., 0., 1.],
              [1., 0., 0.]]], dtype=float32))

    Attributes:
      store: `[n, d]` embeddings, any float type, possibly memory-mapped.
      rows: `[P, R]` int, the row of `store` of each response; any valid row where `mask` is false.
      mask: `[P, R]` bool, true where a response exists.
      gold: `[P, R]` float32 gold rewards (arbitrary units, larger is better), or None; 0 where `mask` is false.
      mean, deviation: `[d]` float32, subtracted from and dividing embeddings as they are read, or None.
      attributes: name -> `[P, R]` float32, named columns of numbers beside gold: length, position, or any column of
        the data, such as a second gold reward; 0 where `mask` is false.
      provenance: names, paths and settings of its making.
    """

    store: np.ndarray
    rows: np.ndarray
    mask: np.ndarray
    gold: np.ndarray | None = None
    mean: np.ndarray | None = None
    deviation: np.ndarray | None = None
    attributes: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(P, R, d)`."""
        return (*self.rows.shape, self.store.shape[1])

    def embeddings(self, prompts: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Embeddings of some prompts, `[p, R, d]` float32, zero where `mask` is false."""
        rows, mask = self.rows[prompts], self.mask[prompts]
        gathered = np.asarray(self.store[rows.reshape(-1)], dtype=np.float32).reshape(*rows.shape, -1)
        if self.mean is not None:
            gathered -= self.mean
        if self.deviation is not None:
            gathered /= self.deviation
        return gathered if mask.all() else np.where(mask[..., None], gathered, np.float32(0))

    def column(self, name: str) -> np.ndarray:
        """A column by name, `[P, R]` float32: `gold`, or one of the attributes.

        Raises:
          JarmError: the table has no such column; the message names its columns.
        """
        columns = ({} if self.gold is None else {"gold": self.gold}) | {
            key: values for key, values in self.attributes.items() if key != "gold"
        }
        if name not in columns:
            known = f"choose from {', '.join(columns)}; other " if columns else ""
            raise JarmError(f"The table has no column {name!r}: {known}columns are read with `--attributes`.")
        return columns[name]

    def take(self, prompts: np.ndarray) -> ResponseTable:
        """The table of some prompts (indices or a boolean mask `[P]`); embeddings are shared, not copied."""
        return dataclasses.replace(
            self,
            rows=self.rows[prompts],
            mask=self.mask[prompts],
            gold=None if self.gold is None else self.gold[prompts],
            attributes={name: values[prompts] for name, values in self.attributes.items()},
        )


class TrainTest(NamedTuple):
    """A table whose pairs are labelled, and a table of other prompts for evaluation; R may differ, d may not.

    Example:
      >>> first, second = (ResponseTable(np.eye(4), np.array([row]), np.ones((1, 2), bool)) for row in ([0, 1], [2, 3]))
      >>> tables = TrainTest(train=first, test=second)
      >>> tables.test.embeddings()
      array([[[0., 0., 1., 0.],
              [0., 0., 0., 1.]]], dtype=float32)
    """

    train: ResponseTable
    test: ResponseTable
