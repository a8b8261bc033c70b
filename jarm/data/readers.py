"""Files in: arrays that stay on disk, and columns of tables; each error is one sentence with its cure."""

from __future__ import annotations

import json
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jarm.core.files import PathLike, existing_file
from jarm.core.messages import brief, listed
from jarm.core.status import JarmError

Pick = Callable[[list[str]], Sequence[str]]
"""All column names of a table in, the columns to read out."""
SCAN_BYTES = 1 << 24
"""Bytes of an array that are searched for NaN at a time."""
_MISFITS = pa.ArrowException, OverflowError, UnicodeEncodeError


class Columns(NamedTuple):
    """Columns read of a table.

    Attributes:
      table: the columns asked for, as far as the table has them.
      names: all its columns.
      numeric: its columns of numbers, or of lists of numbers.
      lines: line of each row in a JSONL file, from 1; blank lines hold no row. None for other files.
    """

    table: pa.Table
    names: list[str]
    numeric: list[str]
    lines: np.ndarray | None = None


def open_npy(path: PathLike) -> np.ndarray:
    """The array of an `.npy` file, memory-mapped read-only and never copied; bfloat16 is recognised.

    Raises:
      JarmError: the file is missing, truncated, empty, no `.npy`, in Fortran order, or not of a float type.
    """
    path = existing_file(path)
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            start = file.tell()
    except (ValueError, SyntaxError, tokenize.TokenError) as error:
        raise JarmError(f"{path} is not a readable .npy file ({brief(error)}): write or copy it again.") from None
    if min(shape, default=0) < 0:
        raise JarmError(f"{path} is not a readable .npy file (shape {shape}): write or copy it again.")
    if dtype == np.dtype("V2"):  # NumPy has no name for bfloat16, so np.save stores raw two-byte values
        dtype = np.dtype(ml_dtypes.bfloat16)
    if not jnp.issubdtype(dtype, np.floating):
        raise JarmError(f"{path} holds {dtype}, not floats: save it as float16, bfloat16 or float32.")
    if fortran and len(shape) > 1:
        raise JarmError(f"{path} is in Fortran order: save np.ascontiguousarray of it, so that a row can be mapped.")
    if 0 in shape or not shape:
        raise JarmError(f"{path} holds no rows (shape {shape}): give at least one response.")
    size, promised = path.stat().st_size - start, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size < promised:
        raise JarmError(
            f"{path} is truncated: it holds {size:,} of the {promised:,} bytes that its header promises for "
            f"shape {shape}; copy or download it again."
        )
    return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape)


def nonfinite_rows(array: np.ndarray) -> Iterator[int]:
    """Indices of rows (first axis) with a NaN or an infinity, read in blocks of 16 MiB, or one row if that is more."""
    step = max(1, SCAN_BYTES // max(1, array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))))
    for start in range(0, len(array), step):
        with np.errstate(over="ignore"):  # values beyond float32 are infinite in every use
            finite = np.isfinite(array[start : start + step].astype(np.float32))
        finite = finite.reshape(min(step, len(array) - start), -1)
        if not finite.all():
            yield from (start + int(row) for row in np.flatnonzero(~finite.all(axis=1)))


def refuse_nonfinite(array: np.ndarray, name: str, width: int | None = None) -> None:
    """Raise a `JarmError` that names the rows with NaN or an infinity; `width` is R where rows are P * R responses."""
    rows = list(nonfinite_rows(array))
    if rows:
        raise JarmError(
            f"{name} is NaN or infinite in {listed(rows, width)}; make those values again, or leave these responses "
            f"out everywhere."
        )


def read_columns(path: PathLike, wanted: Iterable[str], pick: Pick | None = None) -> Columns:
    """Read columns of a Parquet or JSONL table.

    Args:
      path: `.parquet` or `.jsonl`.
      wanted: columns to read, as far as the table has them.
      pick: chooses among `wanted` once all column names of the table are known; None takes all.

    Raises:
      JarmError: the file is missing, truncated (with the line number for JSONL), empty, or of another kind.
    """
    path = existing_file(path)
    if path.suffix == ".parquet":
        columns = _read_parquet(path, list(dict.fromkeys(wanted)), pick)
    elif path.suffix == ".jsonl":
        columns = _read_jsonl(path, list(dict.fromkeys(wanted)), pick)
    else:
        raise JarmError(f"{path} ends in neither .parquet nor .jsonl: convert the table to one of the two.")
    if not len(columns.table):
        raise JarmError(f"{path} holds no rows: give it at least one response.")
    return columns


def _read_parquet(path: Path, wanted: Sequence[str], pick: Pick | None) -> Columns:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if pick is not None:
                wanted = pick(schema.names)
            table = file.read(columns=[name for name in schema.names if name in wanted])
            if not table.num_columns:
                table = file.read(columns=schema.names[:1])
    except (pa.ArrowInvalid, OSError) as error:
        raise JarmError(
            f"{path} is not a whole Parquet file ({brief(error)}): it may be truncated; write or download it again."
        ) from None
    for at, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):  # categories, as dataframes write them
            table = table.set_column(at, field.name, table.column(at).cast(field.type.value_type))
    numeric = [
        field.name for field in schema if is_number(field.type.value_type if is_list(field.type) else field.type)
    ]
    return Columns(table, schema.names, numeric)


def _read_jsonl(path: Path, wanted: Sequence[str], pick: Pick | None) -> Columns:
    values: dict[str, list[Any]] = {name: [] for name in wanted}
    first: dict[str, Any] = {}
    lines: list[int] = []
    with path.open("rb") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except ValueError as error:
                record, reason = None, f" ({brief(error)})"
            else:
                reason = ""
            if not isinstance(record, dict):
                raise JarmError(
                    f"{path}, line {line}, is not a JSON object{reason}: the file may be truncated or damaged "
                    f"there; write that line again or remove it and its embedding."
                )
            for name in wanted:
                values[name].append(record.get(name))
            for name, value in record.items():
                if first.get(name) is None:
                    first[name] = value
            lines.append(line)
    names = list(first)
    arrays = {}
    for name in (name for name in (wanted if pick is None or not names else pick(names)) if name in first):
        column = values.pop(name)
        try:
            arrays[name] = pa.array(column)
        except _MISFITS as error:
            raise JarmError(
                f"{path}, line {lines[_first_misfit(column)]}: {name!r} mixes types, or is no valid text or number "
                f"({brief(error)}): write all values of that column as one type."
            ) from None
    table = pa.table(arrays) if arrays else pa.table({"row": np.arange(len(lines))})
    numeric = [
        name
        for name, value in first.items()
        if isinstance(value[0] if isinstance(value, list) and value else value, int | float)
    ]
    return Columns(table, names, numeric, np.asarray(lines, np.int64))


def _first_misfit(values: list[Any]) -> int:
    """Index of the first value that Arrow cannot put into one column with the values before it."""
    fits, fails = 0, len(values)
    while fails - fits > 1:
        middle = (fits + fails) // 2
        try:
            pa.array(values[:middle])
            fits = middle
        except _MISFITS:
            fails = middle
    return fails - 1


def is_number(kind: pa.DataType) -> bool:
    """Whether a column of this type can be a score."""
    types = pa.types
    return types.is_floating(kind) or types.is_integer(kind) or types.is_decimal(kind) or types.is_boolean(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def is_messages(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists of messages, or of other records."""
    return is_list(kind) and pa.types.is_struct(kind.value_type)
