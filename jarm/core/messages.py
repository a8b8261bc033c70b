"""Parts of sentences: places in a file, the nearest name, choices, sizes and times."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np

from jarm.core.status import JarmError


def listed(
    rows: Sequence[int] | np.ndarray, width: int | None = None, place: Callable[[int], str] | None = None
) -> str:
    """The first three rows, and the number of the others.

    Args:
      rows: row numbers, at least one.
      width: R, to name prompt and response of each row of a grid.
      place: the name of a row; None for `row 7`.

    Example:
      >>> listed([4, 9, 12, 30], width=4)
      'row 4 (prompt 1, response 0), row 9 (prompt 2, response 1), row 12 (prompt 3, response 0) and 1 more'
    """
    places = [f"row {row}" if place is None else place(int(row)) for row in rows[:3]]
    if width:
        places = [f"row {row} (prompt {row // width}, response {row % width})" for row in rows[:3]]
    return ", ".join(places) + (f" and {len(rows) - 3:,} more" if len(rows) > 3 else "")


def nearest(name: str, names: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the nearest of some names, or nothing where none is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def choose(what: str, name: str, options: Collection[str], otherwise: str = "") -> str:
    """The name, if it is an option; otherwise an error that gives the nearest option, or all.

    Args:
      what: the thing that has a name, such as `rule`.
      name: the name given.
      options: the names known.
      otherwise: the end of the list of options, such as `or FILE.py:FUNCTION`.

    Raises:
      JarmError: no option has the name.

    Example:
      >>> choose("fruit", "pear", ["apple", "pear"])
      'pear'
      >>> choose("fruit", "aple", ["apple", "pear"])
      Traceback (most recent call last):
      jarm.core.status.JarmError: There is no fruit 'aple': did you mean 'apple'?
    """
    if name in options:
        return name
    near = difflib.get_close_matches(name.lower(), options, n=1)
    choices = ", ".join([*options, otherwise] if otherwise else options)
    raise JarmError(
        f"There is no {what} {name!r}: " + (f"did you mean {near[0]!r}?" if near else f"choose from {choices}.")
    )


def brief(error: BaseException) -> str:
    """The first line of the message of an error, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def readable(size: float | int) -> str:
    """A number of bytes in a unit of its size, such as `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def clock(seconds: float) -> str:
    """A duration in a unit of its size, such as `25 minutes`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
