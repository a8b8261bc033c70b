"""Free memory of the machine, and sizes that are refused because they exceed it."""

from __future__ import annotations

import pathlib

from jarm.core.messages import readable
from jarm.core.status import JarmError

MACHINE, GROUP = pathlib.Path("/proc/meminfo"), pathlib.Path("/sys/fs/cgroup")
"""Where Linux says what memory the machine, and the container or the job, have."""


def host_bytes() -> int | None:
    """Free memory of the machine, or of the container or the job where these have less, in bytes; None if unknown.

    Pages of files, which the system keeps while it has room, count as free.
    """
    try:
        free = 1024 * _numbers(MACHINE)["MemAvailable:"]
    except (OSError, KeyError):
        return None
    try:
        most, taken = (int((GROUP / name).read_text("utf-8")) for name in ("memory.max", "memory.current"))
        kept = _numbers(GROUP / "memory.stat")
        return min(free, most - taken + kept["active_file"] + kept["inactive_file"])
    except (OSError, ValueError, KeyError):
        return free


def _numbers(path: pathlib.Path) -> dict[str, int]:
    """First word -> number behind it, of the lines of a file of the system."""
    words = (line.split() for line in path.read_text("utf-8").splitlines())
    return {each[0]: int(each[1]) for each in words if len(each) > 1 and each[1].isdigit()}


def refuse_too_large(what: str, needed: int, cure: str, room: int | None = None) -> None:
    """Refuse what needs more memory than is free, before it is tried.

    Args:
      what: beginning of the sentence.
      needed: bytes, at least.
      cure: end of the sentence.
      room: free bytes; None for those of the machine.

    Raises:
      JarmError: it does not fit.

    Example:
      >>> refuse_too_large("A table of 8,000 numbers", 32_000, "take fewer", room=1_000)
      Traceback (most recent call last):
      jarm.core.status.JarmError: A table of 8,000 numbers takes 31 KiB or more, and 1000 B are free: take fewer.
    """
    room = host_bytes() if room is None else room
    if room is not None and needed > room:
        raise JarmError(f"{what} takes {readable(needed)} or more, and {readable(room)} are free: {cure}.")
