"""Tables of responses: prompts, their responses as rows of one embedding array, and named columns."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jarm.core.rows import count_alike, group_rows
from jarm.core.status import JarmError


class Place(NamedTuple):
    """Where a response stands in the data, and what it says.

    Attributes:
      file: name of the file.
      unit, row: `row` from 0, or `line` from 1, and its number.
      prompt_id: of its prompt; the prompt itself where the data have no ids.
      prompt, response: its texts, or lists of messages; None where the data have none.
    """

    file: str
    unit: str
    row: int
    prompt_id: Any
    prompt: Any
    response: Any


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the responses of a table come from.

    Attributes:
      file: name of the file.
      unit: of its rows, `row` from 0 or `line` from 1.
      row: `[P, R]` row of each response in it.
      number: `[P, R]` number of each response in the order of the file.
      ids: of the P prompts.
      read: reads the prompts and responses of the file again, by number; either may be None.
    """

    file: str
    unit: str
    row: np.ndarray
    number: np.ndarray
    ids: Sequence[Any]
    read: Callable[[], tuple[Any, Any]]

    def take(self, prompts: np.ndarray) -> Origin:
        """Those of some prompts."""
        chosen = np.arange(len(self.ids))[prompts]
        ids = [self.ids[at] for at in chosen.tolist()]
        return dataclasses.replace(self, row=self.row[chosen], number=self.number[chosen], ids=ids)


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
      gold: `[P, R]` gold rewards (arbitrary units, larger is better), float32 or, where that would change them,
        float64; or None; 0 where `mask` is false.
      mean, deviation: `[d]` float32, subtracted from and dividing embeddings as they are read, or None.
      attributes: name -> `[P, R]`, as gold, named columns of numbers beside gold: length, position, or any column of
        the data, such as a second gold reward; 0 where `mask` is false.
      provenance: names, paths and settings of its making.
      metric: `[d, r]` float32, by which embeddings are multiplied as they are read, after the division; or None. With
        it their width is r.
      origin: where the responses come from, for `where`; None where that is not a file with texts.
    """

    store: np.ndarray
    rows: np.ndarray
    mask: np.ndarray
    gold: np.ndarray | None = None
    mean: np.ndarray | None = None
    deviation: np.ndarray | None = None
    attributes: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metric: np.ndarray | None = None
    origin: Origin | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(P, R, d)`."""
        return (*self.rows.shape, (self.store if self.metric is None else self.metric).shape[1])

    def embeddings(self, prompts: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Embeddings of some prompts, `[p, R, d]` float32, zero where `mask` is false."""
        rows, mask = self.rows[prompts], self.mask[prompts]
        gathered = np.asarray(self.store[rows.reshape(-1)], dtype=np.float32).reshape(*rows.shape, self.store.shape[1])
        if self.mean is not None:
            gathered -= self.mean
        if self.deviation is not None:
            gathered /= self.deviation
        if self.metric is not None:
            gathered = gathered @ self.metric
        return gathered if mask.all() else np.where(mask[..., None], gathered, np.float32(0))

    @functools.cached_property
    def alike(self) -> np.ndarray | None:
        """`[P, R]` int32, the same number for responses with equal `embeddings`; None where all of them differ."""
        # Before they are mapped: a product may round equal rows unequally.
        plain, real = dataclasses.replace(self, metric=None), np.flatnonzero(self.mask)
        count, width, size = plain.shape

        def rows(part: slice) -> np.ndarray:
            wanted = real[part]
            first, last = wanted[0] // width, wanted[-1] // width + 1
            return plain.embeddings(slice(first, last)).reshape(-1, size)[wanted - first * width]

        groups = group_rows(rows, len(real), size) if len(real) else None
        if groups is None:
            return None
        alike = np.arange(count * width, dtype=np.int32)
        alike[real] = real[groups]
        return alike.reshape(count, width)

    @functools.cached_property
    def copies(self) -> tuple[np.ndarray, int]:
        """Numbers of pairs of responses with equal `embeddings`: in each prompt, `[P]`, and in the whole table."""
        if self.alike is None:
            return np.zeros(len(self.mask), np.int64), 0
        prompt, alike = np.nonzero(self.mask)[0], self.alike[self.mask]
        return count_alike(alike, prompt, len(self.mask)), int(count_alike(alike, np.zeros_like(prompt)).sum())

    def column(self, name: str) -> np.ndarray:
        """A column by name, `[P, R]`: `gold`, or one of the attributes.

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

    def where(self, responses: Any) -> list[Place]:
        """Where responses stand in the data: file, row or line, prompt and text; reads the file again.

        Args:
          responses: their numbers p R + r, as picks and records have them.

        Raises:
          JarmError: the table does not come from a file with texts, or has no such response.
        """
        if self.origin is None:
            raise JarmError("This table does not come from a file of responses, so none can be looked up in it.")
        numbers = np.atleast_1d(np.asarray(responses))
        real = self.mask.reshape(-1)
        inside = np.isin(numbers, np.flatnonzero(real))
        if numbers.dtype.kind not in "iu" or not inside.all():
            odd = numbers[~inside][:1].tolist() or numbers[:1].tolist()
            raise JarmError(
                f"The table has no response {odd[0] if odd else ''}: give numbers p * {self.mask.shape[1]} + r of "
                f"responses r of prompts p, below {real.size:,}."
            )
        origin, width = self.origin, self.mask.shape[1]
        prompts, texts = origin.read()

        def text(values: Any, at: int) -> Any:
            value: Any = None if values is None else values[at]
            return value.as_py() if hasattr(value, "as_py") else value  # of Arrow, where it is

        return [
            Place(
                origin.file,
                origin.unit,
                int(origin.row.reshape(-1)[n]),
                origin.ids[n // width],
                text(prompts, at := int(origin.number.reshape(-1)[n])),
                text(texts, at),
            )
            for n in numbers.tolist()
        ]

    def reordered(self, order: np.ndarray) -> ResponseTable:
        """The table whose response r of prompt p is `order[p, r]` here; `[P, R]` int, a permutation in each row."""

        def taken(values: np.ndarray) -> np.ndarray:
            return np.take_along_axis(values, order, axis=1)

        origin = self.origin
        if origin is not None:
            origin = dataclasses.replace(origin, row=taken(origin.row), number=taken(origin.number))
        return dataclasses.replace(
            self,
            rows=taken(self.rows),
            mask=taken(self.mask),
            gold=None if self.gold is None else taken(self.gold),
            attributes={name: taken(values) for name, values in self.attributes.items()},
            origin=origin,
        )

    def take(self, prompts: np.ndarray) -> ResponseTable:
        """The table of some prompts (indices or a boolean mask `[P]`); embeddings are shared, not copied."""
        return dataclasses.replace(
            self,
            rows=self.rows[prompts],
            mask=self.mask[prompts],
            gold=None if self.gold is None else self.gold[prompts],
            attributes={name: values[prompts] for name, values in self.attributes.items()},
            origin=None if self.origin is None else self.origin.take(prompts),
        )


LARGEST = 1e15
"""Largest magnitude of an embedding whose squares, summed over many responses, stay within float32."""


def check_embeddings(embeddings: np.ndarray, mask: np.ndarray, first: int = 0) -> None:
    """Refuse embeddings that no head can be fitted to, so that the fit is not blamed.

    Args:
      embeddings: `[p, R, d]`, some prompts of a table, zero where `mask` is false.
      mask: `[p, R]`.
      first: number of the first prompt.

    Raises:
      JarmError: one is NaN, infinite or too large, or they have no width; the message names the first.

    Example:
      >>> check_embeddings(np.array([[[1.0, np.nan], [2.0, 3.0]]]), np.ones((1, 2), bool))  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      jarm.core.status.JarmError: The embedding of response 0 of prompt 0 is nan in column 1, and ...
    """
    if not embeddings.shape[2]:
        raise JarmError("The embeddings have no columns: give each response one number or more.")
    if (np.maximum(embeddings.max(axis=(1, 2)), -embeddings.min(axis=(1, 2))) <= LARGEST).all():  # false for a NaN
        return
    bad = ~(np.abs(embeddings) <= LARGEST) & mask[..., None]
    if not bad.any():
        return
    prompt, response, column = (int(index[0]) for index in np.nonzero(bad))
    value = embeddings[prompt, response, column]
    cure = "embed that response again; a column without variance must not be divided by its deviation"
    if np.isfinite(value):
        cure = "look for values that were never written, or divide the embeddings"
    raise JarmError(
        f"The embedding of response {response} of prompt {first + prompt} is {value:.3g} in column {column}, and "
        f"{bad.mean():.2g} of the numbers, in {int(bad.any(axis=(0, 1)).sum()):,} of {embeddings.shape[2]:,} columns, "
        f"are NaN, infinite or beyond {LARGEST:.0e}: {cure}."
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
