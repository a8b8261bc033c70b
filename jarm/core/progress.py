"""Progress and remarks on standard error: a bar on a terminal, plain lines in a file or a pipe, nothing if quiet."""

from __future__ import annotations

import os
import sys
import time

import jax
from tqdm import tqdm

from jarm.core.streams import is_quiet, say

EVERY = 10.0
"""Minimum number of seconds between two lines of progress where standard error is no terminal."""
MEASURED = 1.0
"""Seconds of work, compilation left out, from which the time left is estimated."""

_seconds_compiled = 0.0


def _count_compilation(event: str, duration_secs: float, **_: str | int) -> None:
    global _seconds_compiled
    if event == "/jax/core/compile/backend_compile_duration":
        _seconds_compiled += duration_secs


jax.monitoring.register_event_duration_secs_listener(_count_compilation)


def on_terminal() -> bool:
    """Whether standard error is a terminal that can draw a line anew."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class Progress:
    """Progress of one job; a context manager.

    Args:
      name: of the job.
      total: all of the work, in any unit.
      begin: remark of the first line.
      show: whether this process shows it.
    """

    def __init__(self, name: str, total: int, begin: str = "", *, show: bool = True):
        self.name, self.total, self.done, self._remark = name, total, 0, begin
        self._begin = self._shown = time.monotonic()
        self._first: tuple[float, int] | None = None  # seconds of work and the work done when the first result came
        self._show = show and total > 0 and not is_quiet()
        self._bar: tqdm | None = None
        if self._show and on_terminal():
            self._bar = tqdm(total=total, desc=name, bar_format="{desc}: {percentage:3.0f}% |{bar}|{postfix}")
        self._write()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._first is not None:
            self._write()

    def update(self, work: int, remark: str) -> None:
        """Add work that is done, and say something about it."""
        self.done, self._remark = self.done + work, remark
        if self._first is None:
            self._first = self._worked(), self.done
        if self._bar is not None:
            self._bar.update(work)
        if self._bar is not None or time.monotonic() - self._shown >= EVERY:
            self._write()

    def seconds_left(self) -> float | None:
        """Seconds that the rest will take, from the results after the first; None before they tell."""
        if self._first is None:
            return None
        seconds, done = self._worked() - self._first[0], self.done - self._first[1]
        return seconds * (self.total - self.done) / done if seconds >= MEASURED and done else None

    def _worked(self) -> float:
        """Seconds since the start without compilation."""
        return time.monotonic() - self._begin - _seconds_compiled

    def _write(self) -> None:
        if not self._show:
            return
        self._shown, left = time.monotonic(), self.seconds_left()
        times = tqdm.format_interval(self._shown - self._begin)
        if left is not None and self.done < self.total:
            times += f", about {tqdm.format_interval(left)} left"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._remark}, {times}")
        else:
            say(f"{self.name}: {self.done / self.total:.0%}, {self._remark}, {times}")
