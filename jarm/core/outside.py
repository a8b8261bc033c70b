"""JSON that others wrote: read within limits, then checked field by field, so that each fault is one sentence.

`read_json` reads a file and `parse_json` a text or line. What a field may hold is a `Schema`, in the words of JSON
Schema: `integer(1, 9)`, `string()`, `array(number())`, `struct({"width": integer(1)})`. A schema is a function that
gives the fault of a value, or None.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeAlias

from jarm.core.files import PathLike, existing_file
from jarm.core.messages import brief, readable
from jarm.core.status import JarmError

MAX_DEPTH = 64
"""Largest number of lists and objects within each other."""
MAX_BYTES = 1 << 26
"""Largest file of JSON that is read whole, 64 MiB, unless another limit is given."""

Schema: TypeAlias = Callable[[Any, str], str | None]
"""A value and its place, such as `layers[3].width`, to its fault as a clause, or None."""

_STRING, _BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL), re.compile(r"[\[\]{}]")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_DIGITS = bytes(ord("0") if chr(byte) in "123456789" else ord("e") if byte == ord("E") else byte for byte in range(256))


def parse_json(text: str | bytes, where: str, cure: str, *, strict: bool = True) -> Any:
    """The value of a JSON text, without what JSON or a careful reader does not have.

    Args:
      text: as UTF-8, where it is bytes; a byte order mark is skipped.
      where: the file, and the line in it, as the beginning of a sentence.
      cure: what to do, as its end.
      strict: refuse NaN, infinities, numbers beyond float64 and halves of surrogate pairs, too; a table, which has
        columns that nobody asks for, looks for these in those that it reads.

    Raises:
      JarmError: it is no JSON, has a key twice in an object or more than `MAX_DEPTH` levels.

    Example:
      >>> parse_json('{"width": 4}', "meta.json", "copy it again")
      {'width': 4}
      >>> parse_json('{"width": 4, "width": 5}', "meta.json", "copy it again")
      Traceback (most recent call last):
      jarm.core.status.JarmError: meta.json is not JSON as jarm reads it (the key 'width' occurs twice): copy it again.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode()
        text = text.removeprefix("\ufeff")
        _refuse_depth(text)
        value = (_STRICT if strict and _may_overflow(text) else _FINITE if strict else _ANY).decode(text)
        if strict and _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError:
        raise JarmError(f"{where} is not JSON as jarm reads it (not valid Unicode): {cure}.") from None
    except ValueError as error:
        raise JarmError(f"{where} is not JSON as jarm reads it ({brief(error)}): {cure}.") from None
    return value


def read_json(
    path: PathLike, schema: Schema | None = None, *, cure: str = "copy or download it again", limit: int = MAX_BYTES
) -> Any:
    """The value of a JSON file, checked.

    Args:
      path: the file.
      schema: what it has to hold; None takes any JSON.
      cure: what to do where it is at fault, as the end of a sentence.
      limit: its largest size in bytes.

    Raises:
      JarmError: the file is missing, unreadable, larger than `limit`, no JSON (see `parse_json`), or not of the schema.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "meta.json"
      >>> _ = path.write_text('{"width": -4}')
      >>> read_json(path, struct({"width": integer(1)}))  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      jarm.core.status.JarmError: .../meta.json: width is -4, not a whole number of at least 1: copy or download it ...
    """
    path = existing_file(path)
    try:
        if (size := path.stat().st_size) > limit:
            raise JarmError(f"{path} has {readable(size)}, more than the {readable(limit)} it may have: {cure}.")
        text = path.read_bytes()
    except OSError as error:
        raise JarmError(f"{path} cannot be read ({brief(error)}): {cure}.") from error
    value = parse_json(text, str(path), cure)
    return value if schema is None else checked(value, schema, str(path), cure)


def checked(value: Any, schema: Schema, where: str, cure: str) -> Any:
    """The value, if it has a schema.

    Args:
      value: as `parse_json` gives it.
      schema: what it has to be.
      where: the file, and the line in it, as the beginning of a sentence.
      cure: what to do, as its end.

    Raises:
      JarmError: it has not, with the field and its value.

    Example:
      >>> checked({"layers": [1, "2"]}, struct({"layers": array(integer())}), "config.json", "download it again")
      Traceback (most recent call last):
      jarm.core.status.JarmError: config.json: layers[1] is '2', not a whole number of at least 0: download it again.
    """
    if fault := schema(value, ""):
        raise JarmError(f"{where}: {fault}: {cure}.")
    return value


def anything(value: Any, place: str) -> str | None:
    """Schema of a field that may hold any JSON."""
    return None


def integer(low: int = 0, high: int | None = None) -> Schema:
    """Schema of an integer from `low` to `high`, not written as a float or a bool."""
    return _kind(
        lambda value: type(value) is int and low <= value and (high is None or value <= high),
        f"a whole number {_range(low, high)}",
    )


def number(low: float | int = -math.inf, high: float | int = math.inf) -> Schema:
    """Schema of a finite number from `low` to `high`."""

    def holds(value: Any) -> bool:
        return type(value) in (int, float) and abs(value) < 2**1023 and low <= value <= high

    limits = _range(None if low == -math.inf else low, None if high == math.inf else high)
    return _kind(holds, f"a finite number {limits}".rstrip())


def string(longest: int = 1 << 20) -> Schema:
    """Schema of a string of at most `longest` characters."""
    return _kind(lambda value: isinstance(value, str) and len(value) <= longest, f"a text of up to {longest:,} letters")


def boolean(value: Any, place: str) -> str | None:
    """Schema of true or false."""
    return None if isinstance(value, bool) else _fault(value, place, "true or false")


def enum(*options: Any) -> Schema:
    """Schema of one of some texts, numbers or None, of the same type."""
    kinds = {(type(option), option) for option in options}
    shown = ", ".join(map(repr, options))
    return _kind(
        lambda value: isinstance(value, str | int | float | bool | None) and (type(value), value) in kinds,
        f"one of {shown}" if len(options) > 1 else shown,
    )


def maybe(schema: Schema) -> Schema:
    """Schema of a value that may be null instead."""
    return lambda value, place: None if value is None else schema(value, place)


def either(*schemas: Schema) -> Schema:
    """Schema of a value of one of some schemas; the fault is that of the last."""

    def fault(value: Any, place: str) -> str | None:
        bad = None
        for schema in schemas:
            if (bad := schema(value, place)) is None:
                break
        return bad

    return fault


def array(schema: Schema = anything, low: int = 0, high: int | None = None) -> Schema:
    """Schema of a list of `low` to `high` values of one schema."""

    def fault(value: Any, place: str) -> str | None:
        if not isinstance(value, list) or not low <= len(value) <= (len(value) if high is None else high):
            return _fault(value, place, f"a list {_range(low, high)} values")
        return next((bad for at, each in enumerate(value) if (bad := schema(each, f"{place}[{at}]"))), None)

    return fault


def mapping(schema: Schema = anything) -> Schema:
    """Schema of an object of any keys, whose values have one schema."""

    def fault(value: Any, place: str) -> str | None:
        if not isinstance(value, dict):
            return _fault(value, place, "an object")
        return next((bad for key, each in value.items() if (bad := schema(each, _within(place, key)))), None)

    return fault


def struct(fields: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """Schema of an object with some fields; other keys may hold anything.

    Args:
      fields: name -> schema, of fields that have to be there.
      optional: the same of fields that may be missing.
    """
    every = {**fields, **(optional or {})}

    def fault(value: Any, place: str) -> str | None:
        if not isinstance(value, dict):
            return _fault(value, place, "an object")
        if missing := [name for name in fields if name not in value]:
            return f"{place or 'the object'} has no {missing[0]!r}"
        there = ((name, schema) for name, schema in every.items() if name in value)
        return next((bad for name, schema in there if (bad := schema(value[name], _within(place, name)))), None)

    return fault


def _kind(holds: Callable[[Any], bool], wanted: str) -> Schema:
    return lambda value, place: None if holds(value) else _fault(value, place, wanted)


def _fault(value: Any, place: str, wanted: str) -> str:
    return f"{place or 'the content'} is {_shown(value)}, not {wanted}"


def _shown(value: Any) -> str:
    """A value in a few letters, as JSON names it."""
    names = {None: "null", True: "true", False: "false"}
    return names[value] if value is None or isinstance(value, bool) else reprlib.repr(value)


def _within(place: str, key: str) -> str:
    shown = key if key.isprintable() and len(key) <= 60 else reprlib.repr(key)
    return f"{place}.{shown}" if place else shown


def _range(low: float | int | None, high: float | int | None) -> str:
    if low is None or high is None:
        limit = high if low is None else low
        return "" if limit is None else f"of at {'most' if low is None else 'least'} {limit:,}"
    return f"from {low:,} to {high:,}"


def _refuse_depth(text: str) -> None:
    """Refuse deep nesting, before a parser or a later walk runs out of stack."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for bracket in _BRACKET.findall(_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} lists and objects within each other")


def _may_overflow(text: str) -> bool:
    """Whether a number may be beyond float64: some tenth of the time of a search by a pattern."""
    zeros = text.encode().translate(_DIGITS, b"+")
    return b"e000" in zeros or b"0" * 200 in zeros  # 200 digits and an exponent of two stay below


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {reprlib.repr(twice)} occurs twice")
    return made


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"the number {text[:20]} is not finite")


def _finite_float(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _refuse_number(text)


def _finite_int(text: str) -> int:
    return int(text) if len(text) < 300 else _refuse_number(text)


_ANY = json.JSONDecoder(object_pairs_hook=_object)
_FINITE = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_number)
_STRICT = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_refuse_number, parse_float=_finite_float, parse_int=_finite_int
)
