"""Checks of frozen configs where they are built: of every field its type, and of some what values it may have.

A value is settled first: numbers of NumPy and JAX become Python's, a whole number a float where a float is wanted, a
list a tuple, a text a path. What is neither of the wanted type nor settled into it is refused, and so are a bool for a
number, text for a number, NaN, infinities and text that is empty.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jarm.core.messages import choose, nearest
from jarm.core.status import JarmError

Check: typing.TypeAlias = Callable[[str, Any], object]
"""A check of a settled value, given its name in sentences: it raises a `JarmError`; what it returns is not read."""

INT32 = 2**31 - 1
"""Largest number of an int32, in which devices count."""
_FLOAT32 = float(np.finfo(np.float32).max)
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", pathlib.Path: "a path"}


def check_fields(config: Any, checks: Mapping[str, Check] = types.MappingProxyType({}), name: str = "`{}`") -> None:
    """Settle and check all fields of a frozen config, in its `__post_init__`.

    Args:
      config: the config, whose annotations say what types its fields have.
      checks: field -> the check of its values; None, where the annotation allows it, passes.
      name: how sentences name a field.

    Raises:
      JarmError: a field has another type, or is refused by its check.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Stop:
      ...     steps: int = 10
      ...     share: float | None = None
      ...
      ...     def __post_init__(self):
      ...         check_fields(self, {"steps": at_least(1), "share": between(0, 0.5)})
      >>> Stop(np.int64(3), 0)
      Stop(steps=3, share=0.0)
      >>> Stop(steps=0)
      Traceback (most recent call last):
      jarm.core.status.JarmError: `steps` is 0: give at least 1.
      >>> Stop(steps=True)
      Traceback (most recent call last):
      jarm.core.status.JarmError: `steps` is True: give a whole number.
    """
    kind: Any = type(config)
    for field, hint in _hints(kind).items():
        given, shown = getattr(config, field), name.format(field)
        value = settle(shown, given, hint)
        if value is not given:
            object.__setattr__(config, field, value)
        if field in checks and value is not None:
            checks[field](shown, value)


_ON_HOST = (str, bytes, bool, int, float, complex, list, tuple, dict, set, np.generic, np.ndarray)


def check_numbers(numbers: Any, ranges: Mapping[str, tuple[float | int, float | int]], name: str = "`{}`") -> None:
    """Check the fields of a record of numbers, or of arrays of them; leaves that are not on the host are passed over.

    None passes too: it stands for a leaf in arguments of JAX such as `in_axes`.

    Args:
      numbers: the record.
      ranges: field -> smallest and largest value; of others the smallest is 0.
      name: how sentences name a field.

    Raises:
      JarmError: a field is no number, NaN, infinite or out of its range.
    """
    for field in dataclasses.fields(numbers):
        value, shown = getattr(numbers, field.name), name.format(field.name)
        if isinstance(value, _ON_HOST):
            plain = type(value) in (int, float)
            array = isinstance(value, (np.number, np.ndarray)) and value.dtype.kind in "iufV"  # V is a bfloat16
            if not (plain or array):
                raise JarmError(f"{shown} is {_shown(value)}: give a number.")
            between(*ranges.get(field.name, (0, math.inf)))(shown, value)


@functools.cache
def _hints(config: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config)}


def settle(name: str, value: Any, hint: Any) -> Any:
    """The value of an option as its type has it.

    Args:
      name: of the option, in sentences.
      value: as given.
      hint: the wanted type: of the standard library, a class, a protocol for a function, a union of these, or a tuple
        of any length of them.

    Raises:
      JarmError: the value is of another type, no finite number, or text that is empty.

    Example:
      >>> settle("`layer`", [np.int32(3), -1], tuple[int, ...])
      (3, -1)
      >>> settle("`out`", " ", pathlib.Path | None)
      Traceback (most recent call last):
      jarm.core.status.JarmError: `out` is empty: give a path, or leave it out.
    """
    kinds, kind = _kinds(hint), type(value)
    if kind in kinds and (kind is not str or value.strip()) and (kind is not float or math.isfinite(value)):
        return value  # nearly always, and sweeps build configs by the thousand
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a number of NumPy or JAX
        with contextlib.suppress(Exception):  # a tracer has no value
            value = value.item()
    for kind in kinds:
        if typing.get_origin(kind) is tuple:
            return _settled_items(name, value, typing.get_args(kind)[0])
    if isinstance(value, str) and not value.strip():
        raise JarmError(f"{name} is empty: give {_wanted(kinds)}, or leave it out.")
    if isinstance(value, (str, os.PathLike)) and pathlib.Path in kinds:
        return pathlib.Path(value)
    if isinstance(value, os.PathLike) and str in kinds:
        return os.fspath(value)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = _as_float(value)
    if not any(_is_a(value, kind) for kind in kinds):
        raise JarmError(f"{name} is {_shown(value)}: give {_wanted(kinds)}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise JarmError(f"{name} is {value}: give a finite number.")
    return value


@functools.cache
def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def _is_a(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if getattr(kind, "_is_protocol", False):
        return callable(value)
    return isinstance(kind, type) and isinstance(value, kind)


def _settled_items(name: str, value: Any, hint: Any) -> tuple[Any, ...]:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise JarmError(f"{name} is {_shown(value)}: give a list, such as ({_shown(value)},).")
    return tuple(settle(f"{name}[{at}]", each, hint) for at, each in enumerate(value))


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _wanted(kinds: Sequence[Any]) -> str:
    words = [_WORDS.get(kind) or f"a {getattr(kind, '__name__', kind)}" for kind in kinds if kind is not type(None)]
    return " or ".join(words)


def _shown(value: Any) -> str:
    """A value in a sentence, of one line and not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def at_least(low: float | int) -> Check:
    """A number from `low` on, as `between`."""
    return between(low)


def between(low: float | int = -math.inf, high: float | int = math.inf) -> Check:
    """A number from `low` to `high`, or an array of such numbers; NaN and infinities are none, as float32 has them.

    Example:
      >>> between(0, 1)("`prior_mix`", np.array([0.5, 1.5]))
      Traceback (most recent call last):
      jarm.core.status.JarmError: `prior_mix` is array([0.5, 1.5]): give a finite number of at least 0 and at most 1.
    """

    def check(name: str, value: Any) -> None:
        if isinstance(value, (int, float)):
            fine = low <= value <= high and (isinstance(value, int) or abs(value) <= _FLOAT32)
        else:
            array = np.asarray(value)
            fine = ((array >= low) & (array <= high) & (np.abs(array) <= _FLOAT32)).all()
        if not fine:
            shown_high = math.inf if high == INT32 and not np.any(np.asarray(value) > high) else high
            ends = [f"{word} {end}" for word, end in (("at least", low), ("at most", shown_high)) if math.isfinite(end)]
            finite = "" if isinstance(value, int) else "a finite number of " if ends else "a finite number"
            raise JarmError(f"{name} is {_shown(value)}: give {finite}{' and '.join(ends)}.")

    return check


def one_of(*names: str) -> Check:
    """One of some names; the sentence has the nearest, or all."""

    def check(name: str, value: Any) -> None:
        if value not in names:
            near = nearest(value.lower(), names)
            raise JarmError(f"{name} is {_shown(value)}{near}: choose one of {', '.join(names)}.")

    return check


def named(what: str, options: Collection[str]) -> Check:
    """The name of a thing, as `choose` takes it."""

    def check(_: str, value: Any) -> None:
        choose(what, value, options)

    return check


def some_distinct(name: str, values: Any) -> None:
    """Check that a list has a value at least, and none twice."""
    if not values:
        raise JarmError(f"{name} is empty: give one value or more.")
    distinct(name, values)


def distinct(name: str, values: Any) -> None:
    """Check that a list of hashable values has none twice."""
    seen = set[Any]()
    for value in values:
        if value in seen:
            raise JarmError(f"{name} holds {_shown(value)} twice: leave one out.")
        seen.add(value)
