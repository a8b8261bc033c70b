"""Options of commands: configs built from words, and words that are no command line."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import typing
from typing import Any, NoReturn, TypeVar

import tyro

from jarm.core.status import JarmError, printable

T = TypeVar("T")


class Refused(Exception):
    """What a config refuses while tyro builds it: tyro makes boxes of ValueErrors, and `main` sentences."""


def built_by(config: type[T]) -> Any:
    """How tyro builds a config: as its class does, but for the errors."""

    @functools.wraps(config, updated=())
    def build(**options: Any) -> T:
        try:
            return config(**options)
        except JarmError as error:
            raise Refused(str(error)) from error

    build.__doc__ = config.__doc__
    build.__signature__ = inspect.signature(config)  # type: ignore[attr-defined]
    build.__annotations__ = typing.get_type_hints(config)
    return tyro.conf.arg(constructor=build)


def misused(sentence: str) -> NoReturn:
    """End with code 2 and a sentence: the words are no command line."""
    complain(sentence)
    raise SystemExit(2)


def complain(what: object) -> None:
    """Print a sentence on standard error, if it can be written."""
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError):
        sentence = f"jarm: {printable(what)}".encode(encoding, "backslashreplace").decode(encoding)
        print(sentence, file=sys.stderr, flush=True)
