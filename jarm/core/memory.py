"""Free memory of the machine, and sizes that are refused because they exceed it."""

from __future__ import annotations

import pathlib

from jarm.core.messages import readable
from jarm.core.status import JarmError


def host_bytes() -> int | None:
    """Free memory of the machine, or of the container or the job where these have less, in bytes; None if unknown."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text("utf-8").splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    except (OSError, StopIteration, ValueError):
        return None
    group = pathlib.Path("/sys/fs/cgroup")
    try:
        return min(
            free, int((group / "memory.max").read_text("utf-8")) - int((group / "memory.current").read_text("utf-8"))
        )
    except (OSError, ValueError):
        return free


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
