"""Files in: arrays that stay on disk, and columns of tables; each error is one sentence with its cure."""

from __future__ import annotations

import decimal
import math
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
from jarm.core.outside import parse_json
from jarm.core.status import JarmError
from jarm.data.arrow import is_list, is_number, plain, plain_type

Pick = Callable[[list[str]], Sequence[str]]
"""All column names of a table in, the columns to read out."""
SCAN_BYTES = 1 << 24
"""Bytes of an array that are searched for NaN at a time."""
_CURE = "the file may be truncated or damaged there; write that line again or remove it and its embedding"
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
    except OSError as error:
        raise JarmError(f"{path} cannot be read ({brief(error)}): check the file.") from error
    except Exception as error:  # NumPy evaluates the header as Python, with errors of many kinds
        raise JarmError(f"{path} is not a readable .npy file ({brief(error)}): write or copy it again.") from None
    if any(type(size) is not int or size < 0 for size in shape):
        raise JarmError(f"{path} is not a readable .npy file (shape {shape}): write or copy it again.")
    if dtype == np.dtype("V2"):  # NumPy has no name for bfloat16, so np.save stores raw two-byte values
        dtype = np.dtype(ml_dtypes.bfloat16)
    if not jnp.issubdtype(dtype, np.floating):
        raise JarmError(f"{path} holds {dtype}, not floats: save it as float16, bfloat16 or float32.")
    if fortran and len(shape) > 1:
        raise JarmError(f"{path} is in Fortran order: save np.ascontiguousarray of it, so that a row can be mapped.")
    if 0 in shape or not shape:
        raise JarmError(f"{path} holds no rows (shape {shape}): give at least one response.")
    size, promised = path.stat().st_size - start, math.prod(shape) * dtype.itemsize
    if size < promised:
        raise JarmError(
            f"{path} is truncated: it holds {size:,} of the {promised:,} bytes that its header promises for "
            f"shape {shape}; copy or download it again."
        )
    try:
        return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape)
    except (OSError, ValueError, OverflowError) as error:
        raise JarmError(f"{path} cannot be mapped into memory ({brief(error)}): check the file.") from error


def _nonfinite(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks with a NaN or an infinity, of 16 MiB or one row if that is more: first row, and where, `[rows, width]`."""
    step = max(1, SCAN_BYTES // max(1, array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))))
    for start in range(0, len(array), step):
        with np.errstate(over="ignore"):  # values beyond float32 are infinite in every use
            finite = np.isfinite(array[start : start + step].astype(np.float32))
        if not finite.all():
            yield start, ~finite.reshape(len(finite), -1)


def nonfinite_rows(array: np.ndarray) -> Iterator[int]:
    """Indices of rows (first axis) with a NaN or an infinity."""
    for start, bad in _nonfinite(array):
        yield from (start + int(row) for row in np.flatnonzero(bad.any(axis=1)))


def refuse_nonfinite(array: np.ndarray, name: str, width: int | None = None) -> None:
    """Refuse NaN and infinities, by row and column; `width` is R where rows are P * R responses.

    Raises:
      JarmError: there are such values; the message says where, how many, and what may have made them.
    """
    rows, columns = list[int](), np.zeros(int(np.prod(array.shape[1:], dtype=np.int64)), np.int64)
    for start, bad in _nonfinite(array):
        rows += (start + np.flatnonzero(bad.any(axis=1))).tolist()
        columns += bad.sum(axis=0)
    if not rows:
        return
    where, cure = "", "make those values again, or leave these responses out everywhere"
    if array.ndim > 1:
        holding = np.flatnonzero(columns)
        share = columns.sum() / array.size
        where = f"column {holding[0]} and {len(holding) - 1:,} more" if len(holding) > 1 else f"column {holding[0]}"
        where = f" in {where} of {len(columns):,}, {share:.2g} of all numbers;"
        if (columns == len(array)).any():
            cure = (
                "a column without variance gives NaN where it is divided by its deviation: write 0 there, or leave "
                "standardising to jarm"
            )
        elif array.dtype == np.float16:
            cure = f"float16 ends at 65,504: save float32 or bfloat16, or {cure}"
    raise JarmError(f"{name} is NaN or infinite in {listed(rows, width)};{where} {cure}.")


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
            if twice := [name for name in wanted if schema.names.count(name) > 1]:
                raise JarmError(
                    f"{path} has {schema.names.count(twice[0])} columns called {twice[0]!r}: rename all but one, or "
                    "leave them out."
                )
            columns = [name for name in schema.names if name in wanted]
            # One by one, since pyarrow cannot join lists of categories of several groups as it reads.
            groups = [file.read_row_group(group, columns=columns) for group in range(file.num_row_groups)]
            table = pa.concat_tables(groups) if groups else file.read(columns=columns)
            if not columns:
                table = pa.table({"row": np.arange(file.metadata.num_rows)})
    except (pa.ArrowException, OSError) as error:
        raise JarmError(
            f"{path} is not a whole Parquet file ({brief(error)}): it may be truncated; write or download it again."
        ) from None
    kinds = {field.name: plain_type(field.type) for field in schema}
    numeric = [name for name, kind in kinds.items() if is_number(kind.value_type if is_list(kind) else kind)]
    table = pa.table({name: plain(table[name]) for name in table.column_names})
    return Columns(table, schema.names, numeric)


def _read_jsonl(path: Path, wanted: Sequence[str], pick: Pick | None) -> Columns:
    values: dict[str, list[Any]] = {name: [] for name in wanted}
    first: dict[str, Any] = {}
    lines: list[int] = []
    with path.open("rb") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            where = f"{path}, line {line},"
            record = parse_json(text, where, _CURE, strict=False)
            if not isinstance(record, dict):
                raise JarmError(f"{where} is not a JSON object: {_CURE}.")
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
            arrays[name] = _array(column)
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


def _array(values: list[Any]) -> pa.Array:
    """Values of JSON as one column; integers of more than 64 bits as decimals, or beside fractions as floats."""
    try:
        return pa.array(values)
    except _MISFITS:
        kinds = {type(value) for value in values if value is not None}
        if kinds == {int}:
            if all(value is None or 0 <= value < 1 << 64 for value in values):
                return pa.array(values, pa.uint64())
            return pa.array([None if value is None else decimal.Decimal(value) for value in values])
        if kinds == {int, float}:
            return pa.array([None if value is None else float(value) for value in values], pa.float64())
        raise


def _first_misfit(values: list[Any]) -> int:
    """Index of the first value that Arrow cannot put into one column with the values before it."""
    fits, fails = 0, len(values)
    while fails - fits > 1:
        middle = (fits + fails) // 2
        try:
            _array(values[:middle])
            fits = middle
        except _MISFITS:
            fails = middle
    return fails - 1
