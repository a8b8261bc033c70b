"""Standard streams: results go to standard output, progress and remarks to standard error.

Both take any text: what a terminal would obey, or the encoding of a stream lacks, is written as an escape.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator

from jarm.core.status import JarmError, printable

_quiet = False


@contextlib.contextmanager
def any_text() -> Iterator[None]:
    """Characters that the encoding of a standard stream lacks are written as escapes while the block runs.

    A standard error that is closed takes everything and keeps nothing.

    Raises:
      JarmError: standard output is closed or cannot be written.
      BrokenPipeError: who read standard output has gone.
    """
    if sys.stderr is None:
        with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.redirect_stderr(nothing), any_text():
            yield
        return
    if sys.stdout is None:
        raise JarmError("Standard output is closed: give it a file, or /dev/null.")
    before = [(each, each.errors) for each in (sys.stdout, sys.stderr) if isinstance(each, io.TextIOWrapper)]
    for stream, _ in before:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        try:
            with _written():  # what others print
                sys.stdout.flush()
        finally:
            for stream, errors in before:
                with contextlib.suppress(OSError, ValueError):
                    stream.reconfigure(errors=errors)


@contextlib.contextmanager
def quieted(quiet: bool = True) -> Iterator[None]:
    """No progress and no remarks in any thread while the block runs, unless `quiet` is False."""
    global _quiet
    before, _quiet = _quiet, _quiet or quiet
    try:
        yield
    finally:
        _quiet = before


def is_quiet() -> bool:
    """Whether progress and remarks are left out."""
    return _quiet


def say(remark: object) -> None:
    """Print a remark to standard error, unless it is quiet; a stream that is gone takes nothing."""
    if not _quiet:
        with contextlib.suppress(OSError):
            print(_lines(remark), file=sys.stderr, flush=True)


def show(result: object) -> None:
    """Print a result to standard output.

    Raises:
      JarmError: it cannot be written.
      BrokenPipeError: who read standard output has gone.
    """
    with _written():
        print(_lines(result), flush=True)


def _lines(text: object) -> str:
    return "\n".join(map(printable, str(text).split("\n")))


@contextlib.contextmanager
def _written() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # else the interpreter would try again as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise JarmError(f"Cannot write to standard output ({error.strerror}): give it a file with room.") from None
