"""Ids of prompts: whole numbers or texts, compared by value, whatever library holds them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from jarm.core.status import JarmError

Id = int | str | tuple["Id", ...]
"""A plain id: two are the same where Python says that they are equal."""


def read_ids(name: str, values: Any, place: Callable[[int], str] | None = None) -> list[Id]:
    """One plain id per entry, in order.

    An id is a text, a whole number, what holds one by value (numbers of NumPy; arrays of one number and no axes, of
    NumPy, JAX or PyTorch; members of IntEnum and StrEnum), or a tuple of these. Truth values, floats, bytes and all
    else are refused, and so is a column in which both 1 and "1" occur.

    Args:
      name: the column, for messages, such as `prompts`.
      values: a list, an array, or a column of another library.
      place: the name of an entry by its number, for messages; None for `Entry 3 of NAME`.

    Returns:
      The ids as Python's `int`, `str` and `tuple`.

    Raises:
      JarmError: there is no such column, or an entry is missing, is no id, or may be taken for another.

    Example:
      >>> read_ids("prompts", [np.int64(3), np.array(3), "a", ("set", np.int8(1))])
      [3, 3, 'a', ('set', 1)]
      >>> read_ids("prompts", [3, 2.5])
      Traceback (most recent call last):
      jarm.core.status.JarmError: Entry 1 of prompts is a float (2.5): give ids, texts or whole numbers, one each.
    """
    entries = _entries(name, values)
    place = place or (lambda row: f"Entry {row} of {name}")
    ids: list[Id] = []
    unknown: list[int] = []
    for row, entry in enumerate(entries):
        try:
            ids.append(plain_id(entry))
        except Exception:  # whatever another library raises, too
            unknown.append(row)
    if unknown:
        _refuse(entries, unknown, place)
    _refuse_mixture(ids, place)
    return ids


def code_ids(ids: Iterable[Id]) -> tuple[np.ndarray, list[Id]]:
    """Ids numbered in order of first appearance: `[n]` int64 codes, and the id of each code.

    Example:
      >>> code_ids(["b", "a", "b"])
      (array([0, 1, 0]), ['b', 'a'])
    """
    seen: dict[Id, int] = {}
    codes = [seen.setdefault(each, len(seen)) for each in ids]
    return np.array(codes, np.int64), list(seen)


def plain_id(value: Any) -> Id:
    """The id that a value holds.

    Raises:
      TypeError: it holds none.

    Example:
      >>> plain_id(np.str_("a")), plain_id(np.array(7))
      ('a', 7)
    """
    if type(value) in (int, str):
        return value
    if isinstance(value, tuple):
        return tuple(plain_id(each) for each in value)
    if isinstance(value, np.datetime64 | np.timedelta64):  # `item` of some is a whole number
        raise TypeError("a time is no id")
    if hasattr(value, "as_py"):  # a scalar of Arrow
        value = value.as_py()
    elif getattr(value, "shape", None) == () and hasattr(value, "item"):  # a number or an array of no axes
        value = value.item()
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bool) or getattr(value, "shape", ()) != ():
        raise TypeError("no id")
    return operator.index(value)


def _entries(name: str, values: Any) -> list[Any]:
    """The entries of a column of any library."""
    known = isinstance(values, Sequence) or any(hasattr(values, way) for way in ("tolist", "to_pylist", "__array__"))
    if not known or isinstance(values, str | bytes | bytearray | Mapping | AbstractSet):
        raise JarmError(
            f"{name} is a {type(values).__name__}: give a list or an array of ids, texts or whole numbers, one each."
        )
    shape = getattr(values, "shape", None)
    if shape is not None and len(shape) != 1:
        raise JarmError(f"{name} has shape {tuple(shape)}: give one id each, in a single row.")
    if isinstance(values, np.ndarray) and values.dtype.kind in "mMSV":  # `tolist` of some would be whole numbers
        return list(values)
    for way in ("to_pylist", "tolist"):
        if hasattr(values, way):
            return list(getattr(values, way)())
    return list(values)


def _is_missing(value: Any) -> bool:
    """None, NaN, or what pandas writes for a missing value."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    try:
        return bool(value != value)
    except Exception:  # whatever other libraries raise where this is no single answer
        return False


def _refuse(entries: Sequence[Any], unknown: Sequence[int], place: Callable[[int], str]) -> None:
    """Name the first entry that is missing, or else the first that is no id."""
    for row in unknown:
        if _is_missing(entries[row]):
            raise JarmError(f"{place(row)} is missing ({entries[row]}): name it, or leave the row out.")
    row = unknown[0]
    entry = entries[row]
    shown = f" ({entry!s})" if isinstance(entry, bool | float | bytes) and len(str(entry)) < 40 else ""
    cure = "give ids, texts or whole numbers, one each"
    if isinstance(entry, float) and all(_is_missing(each) or _is_whole(each) for each in entries):
        cure = 'write the column as whole numbers (in pandas by `.astype("Int64")`), or as texts'
    raise JarmError(f"{place(row)} is a {type(entry).__name__}{shown}: {cure}.")


def _is_whole(value: Any) -> bool:
    """A float without a fraction, as pandas writes whole numbers in a column with a gap."""
    return isinstance(value, float) and value.is_integer()


def _refuse_mixture(ids: Sequence[Id], place: Callable[[int], str]) -> None:
    """Refuse 1 beside "1", which one library writes for the other."""
    if len({type(each) for each in ids}) < 2:
        return
    numbers: dict[str, int] = {}
    texts: dict[str, int] = {}
    for row, each in enumerate(ids):
        if isinstance(each, int):
            numbers.setdefault(str(each), row)
        elif isinstance(each, str):
            texts.setdefault(each, row)
    both = next((text for text in texts if text in numbers), None)
    if both is not None:
        first, second = sorted((numbers[both], texts[both]))
        kinds = ("number", "text") if first == numbers[both] else ("text", "number")
        raise JarmError(
            f"{place(second)} is the {kinds[1]} {both}, and the {kinds[0]} {both} came before ({place(first)}): write "
            "all ids as texts, or all as numbers."
        )
