"""Options of commands: configs built from words, and words that are no command line."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NoReturn, TypeVar

import tyro

from jarm.core.status import JarmError, printable
from jarm.core.streams import quieted

T = TypeVar("T")


class Refused(Exception):
    """What a config refuses while tyro builds it: tyro makes boxes of ValueErrors, and `main` sentences."""


def built_by(config: type[T], positional: Mapping[str, str] = types.MappingProxyType({})) -> Any:
    """How tyro builds a config: as its class does, but for the errors.

    Args:
      config: the class.
      positional: options that are words without a name -> what help calls them.
    """

    @functools.wraps(config, updated=())
    def build(**options: Any) -> T:
        try:
            return config(**options)
        except JarmError as error:
            raise Refused(str(error)) from error

    build.__doc__ = config.__doc__
    hints = typing.get_type_hints(config)
    for name, word in positional.items():
        hints[name] = Annotated[hints[name], tyro.conf.Positional, tyro.conf.arg(metavar=word)]
    signature = inspect.signature(config)
    parameters = [each.replace(annotation=hints[name]) for name, each in signature.parameters.items()]
    build.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    build.__annotations__ = hints
    del build.__wrapped__
    return tyro.conf.arg(constructor=build)


def deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """A command with the option `--quiet`, as a function that returns what is to be run once all options are read."""

    @functools.wraps(command)
    def wrapper(*args: Any, quiet: bool = False, **options: Any) -> Callable[[], None]:
        def run() -> None:
            with quieted(quiet):
                command(*args, **options)

        return run

    text = tyro.conf.arg(help="Leave progress and remarks out; results and errors stay.")
    kind = Annotated[bool, tyro.conf.FlagCreatePairsOff, text]
    option = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
    signature = inspect.signature(command)
    hints = {**typing.get_type_hints(command, include_extras=True), "quiet": kind}
    parameters = [each.replace(annotation=hints[each.name]) for each in signature.parameters.values()]
    wrapper.__dict__.update(__signature__=signature.replace(parameters=[*parameters, option]))
    wrapper.__annotations__ = hints
    del wrapper.__wrapped__
    return wrapper


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
