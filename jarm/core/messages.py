"""Parts of sentences: lists of places, nearest names, sizes and times."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence

import numpy as np


def listed(
    rows: Sequence[int] | np.ndarray, width: int | None = None, place: Callable[[int], str] | None = None
) -> str:
    """The first three rows and how many more there are, with prompt and response where `width` is R.

    `place` says where a row is, if not in a row of that number.
    """
    places = [f"row {row}" if place is None else place(int(row)) for row in rows[:3]]
    if width:
        places = [f"row {row} (prompt {row // width}, response {row % width})" for row in rows[:3]]
    return ", ".join(places) + (f" and {len(rows) - 3:,} more" if len(rows) > 3 else "")


def nearest(name: str, names: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"`, or nothing where no name is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def brief(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def readable(size: float | int) -> str:
    """A number of bytes, for print."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def clock(seconds: float) -> str:
    """A duration, for print."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
