"""Tables from files, folders of shards, and datasets on disk or on the Hugging Face hub."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jarm.core.files import PathLike
from jarm.core.messages import brief
from jarm.core.status import JarmError
from jarm.core.version import DISTRIBUTION
from jarm.data.arrow import is_list, is_messages, plain
from jarm.data.readers import Columns, Pick, read_columns

RESPONSES = ("response", "responses", "completion")
"""Names of a column of responses, by precedence."""
CHOSEN = ("chosen", "rejected")
"""Names of the columns of pairs whose first response is preferred."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ENDINGS = (".parquet", ".jsonl")


class Source(NamedTuple):
    """A table, and its name in errors."""

    name: str
    columns: Columns

    def at(self, row: int) -> str:
        """A row in words."""
        lines = self.columns.lines
        return f"{self.name}, row {row}" if lines is None else f"{self.name}, line {lines[row]}"

    def column(self, name: str) -> pa.ChunkedArray:
        """A column without gaps.

        Raises:
          JarmError: a value is missing.
        """
        values = self.columns.table[name]
        if values.null_count:
            row = int(np.flatnonzero(np.asarray(values.is_null()))[0])
            raise JarmError(f"{self.at(row)}: {name} is missing; write it, or leave the row out.")
        return values

    def flattened(self, name: str) -> tuple[np.ndarray, pa.ChunkedArray]:
        """The row of each element of a column of lists, and the elements.

        Raises:
          JarmError: a list or an element is missing, or a list is empty.
        """
        values = self.column(name)
        counts = np.asarray(pc.list_value_length(values))
        if not counts.all():
            raise JarmError(
                f"{self.at(int(np.argmin(counts)))}: {name} is an empty list; fill it, or leave the row out."
            )
        rows, elements = np.repeat(np.arange(len(counts)), counts), pc.list_flatten(values)
        if elements.null_count:
            row = int(rows[np.flatnonzero(np.asarray(elements.is_null()))[0]])
            raise JarmError(f"{self.at(row)}: {name} has an element that is missing; write it, or leave it out.")
        return rows, elements


def are_pairs(names: Sequence[str]) -> bool:
    """Whether columns of these names hold pairs, and not responses one by one.

    Example:
      >>> are_pairs(["prompt", "chosen", "rejected"]), are_pairs(["prompt", "response", "chosen", "rejected"])
      (True, False)
    """
    return set(CHOSEN) <= set(names) and not set(RESPONSES) & set(names)


def read_sources(
    inputs: Sequence[PathLike], wanted: Sequence[str], needed: Callable[[str, list[str]], list[str]], split: str | None
) -> Iterator[Source]:
    """Tables of all inputs, in their order.

    Args:
      inputs: as for `read_texts`.
      wanted: columns that may be needed.
      needed: name of a table and names of its columns in, the columns needed out.
      split: split of a dataset; by default `train`.

    Raises:
      JarmError: an input is missing, damaged or of another kind; `datasets` is needed and not installed.
    """
    for given in inputs:
        name, path = str(given), Path(given)
        saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
        if saved or (not path.exists() and path.suffix not in _ENDINGS and _HUB_ID.fullmatch(name)):
            yield Source(name, _read_dataset(name, saved, split, functools.partial(needed, name)))
            continue
        if split is not None:
            raise JarmError(f"{name} is no dataset that has a split {split!r}: leave `--split` out, or name a dataset.")
        shards = [path]
        if path.is_dir():
            shards = sorted(p for p in path.iterdir() if p.suffix in _ENDINGS and not p.name.startswith("."))
            if not shards:
                raise JarmError(
                    f"{name} is a folder without .parquet or .jsonl files, and no dataset that `save_to_disk` wrote: "
                    "name the folder that holds the files."
                )
        for shard in shards:
            yield Source(str(shard), read_columns(shard, wanted, functools.partial(needed, str(shard))))


def _read_dataset(name: str, saved: bool, split: str | None, pick: Pick) -> Columns:
    """Columns of a dataset on disk or on the hub."""
    try:
        import datasets
    except ImportError:
        what = "is a dataset that `save_to_disk` wrote" if saved else "is no file or folder here, but may be on the hub"
        raise JarmError(f"{name} {what}: to read it, `pip install '{DISTRIBUTION}[hub]'`.") from None
    try:
        data = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # datasets and its dependencies raise anything
        what = "a dataset on disk" if saved else "a file or folder here, nor as a dataset of the hub"
        raise JarmError(f"{name} cannot be read as {what} ({brief(error)}): check the name and the split.") from error
    if isinstance(data, datasets.DatasetDict):
        if (split or "train") not in data:
            raise JarmError(f"{name} has no split {split or 'train'!r}: give `--split` one of {', '.join(data)}.")
        data = data[split or "train"]
    elif saved and split is not None:
        raise JarmError(f"{name} is one dataset without splits: leave `--split` out.")
    names = data.column_names
    if not len(data):
        raise JarmError(f"{name} holds no rows: give at least one prompt with a response.")
    table = data.select_columns(pick(names)).with_format("arrow")[:]
    return Columns(pa.table({name: plain(table[name]) for name in table.column_names}), names, [])


def one_row_a_response(source: Source, scores: Sequence[str]) -> tuple[pa.Table, np.ndarray]:
    """A table with one row per response, from a table with one response or a list of responses per row.

    Args:
      source: a table whose responses are in the first of `RESPONSES` that it has; without any it stays unchanged.
      scores: columns with a number for each response; of these, lists as long as the list of responses.

    Returns:
      The table, with the response in `response`, and the source row of each of its rows, `[n]`.

    Raises:
      JarmError: a list of responses is missing, empty, or not as long as a list of scores.
    """
    table = source.columns.table
    own = next((name for name in RESPONSES if name in table.column_names), "response")
    if own not in table.column_names or not is_list(table[own].type) or is_messages(table[own].type):
        aliased = own in table.column_names and own != "response"
        return table.append_column("response", table[own]) if aliased else table, np.arange(len(table))
    rows, responses = source.flattened(own)
    flat = {own: responses, "response": responses}
    for score in [name for name in scores if name in table.column_names]:
        if not is_list(table[score].type):
            raise JarmError(
                f"{source.name}: {own} holds lists, and {score} {table[score].type}: give a list of scores, one for "
                "each response of the row."
            )
        scored, flat[score] = source.flattened(score)
        has, given = (np.bincount(of, minlength=len(table)) for of in (rows, scored))
        if (has != given).any():
            row = int(np.argmax(has != given))
            raise JarmError(
                f"{source.at(row)}: {own} has {has[row]} elements and {score} {given[row]}; give each response one "
                "score."
            )
    others = {name: table[name] for name in table.column_names if name not in flat}
    for name, column in others.items():
        if pa.types.is_string(column.type):  # repeated texts may outgrow offsets of 32 bits
            column = column.cast(pa.large_string())
        flat[name] = column.take(rows)
    return pa.table(flat), rows
