"""Interrupts that are heeded within seconds, though a compilation holds the thread that works.

A signal sets `STOP`. Loops whose results are worth keeping wait for them through `ahead` or `wait_some`, which give up
on a result that does not come; `leavable` gives up on a whole command. A thread that was given up on cannot be ended:
the process has to be left by `os._exit`, as `was_left` says.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from types import FrameType
from typing import Any, TypeVar

from jarm.core.status import JarmError
from jarm.core.streams import say

T = TypeVar("T")

STOP = threading.Event()
"""Set by the first signal to stop, while `stoppable` hears it."""
GRACE = 2.0
"""Seconds that a result under way has to come after a signal to stop, and twice that a command to put things away."""
LOOK = 0.2
"""Seconds between two looks at whether to stop."""

_left = threading.Event()
_heeding: list[None] = []  # an entry for each loop that will stop by itself, having something to keep


class Stopped(JarmError):
    """A signal stopped the work; the message says what is kept."""


def was_left() -> bool:
    """Whether a thread that is at work was left: the interpreter would wait for it, or crash at its end."""
    return _left.is_set()


@contextlib.contextmanager
def stoppable() -> Iterator[threading.Event]:
    """`STOP`, which the first SIGINT or SIGTERM sets while the block runs; a second one raises KeyboardInterrupt.

    Signals reach the main thread alone: in another one nothing is set up, since who started it hears them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield STOP
        return

    def handle(_: int, frame: FrameType | None) -> None:
        if STOP.is_set():
            raise KeyboardInterrupt
        STOP.set()
        with contextlib.suppress(RuntimeError):  # the frame under way may be printing, too
            say("\nStopping after what is under way; again to stop at once.")

    STOP.clear()
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield STOP
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if not _left.is_set():  # what was left is not to go on
            STOP.clear()


def leavable(command: Callable[[], T]) -> T:
    """The result of a command, which works in a thread; after a signal to stop it is given a few seconds.

    Raises:
      KeyboardInterrupt: the command was stopped, or left at work.
    """
    if threading.current_thread() is not threading.main_thread():
        return command()
    done: Future[T] = Future()

    def work() -> None:
        try:
            done.set_result(command())
        except BaseException as error:
            done.set_exception(error)

    with stoppable():
        threading.Thread(target=work, daemon=True, name="jarm").start()
        since = time.monotonic()
        try:
            while not done.done():
                concurrent.futures.wait([done], timeout=LOOK)
                if _heeding or not STOP.is_set():
                    since = time.monotonic()
                elif time.monotonic() - since > 2 * GRACE:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            _left.set()
            raise
        return done.result()


def ahead(items: Iterable[T], max_ahead: int = 1, *, patient: bool = False) -> Generator[T]:
    """The same items, made in a thread that is at most `max_ahead` items ahead; its errors are raised here.

    After a signal to stop, items are taken as long as each comes within `GRACE`.

    Args:
      items: the items; they end, or not, as they hear of `STOP` themselves.
      max_ahead: number of items that wait to be taken.
      patient: whether to wait for an item however long it takes, as where other processes wait for this one.

    Raises:
      KeyboardInterrupt: the next item did not come in time after a signal to stop; the thread is left behind.
    """
    waiting: queue.Queue[tuple[bool, Any]] = queue.Queue(max_ahead)
    stopped = threading.Event()

    def put(entry: tuple[bool, Any]) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                return waiting.put(entry, timeout=0.1)

    def make() -> None:
        try:
            for item in items:
                put((True, item))
                if stopped.is_set():
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    def look(timeout: float) -> list[tuple[bool, Any]]:
        try:
            return [waiting.get(timeout=timeout)]
        except queue.Empty:
            return []

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            more, item = _await(look, patient=patient)[0]
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        stopped.set()
        thread.join(LOOK)
        while thread.is_alive() and not (STOP.is_set() or isinstance(sys.exception(), KeyboardInterrupt)):
            thread.join(LOOK)
        if thread.is_alive():
            _left.set()


def wait_some(pending: set[Future[T]]) -> set[Future[T]]:
    """The futures that are done, at least one; after a signal to stop those that have not begun are cancelled.

    Raises:
      KeyboardInterrupt: none was done in time after a signal to stop.
    """

    def look(timeout: float) -> set[Future[T]]:
        if STOP.is_set():
            for future in pending:
                future.cancel()
        concurrent.futures.wait(pending, timeout, concurrent.futures.FIRST_COMPLETED)
        return {future for future in pending if future.done()}

    try:
        return _await(look)
    except KeyboardInterrupt:
        _left.set()
        raise


def _await(look: Callable[[float], T], *, patient: bool = False) -> T:
    """What `look(seconds)` finds, once it finds something.

    Raises:
      KeyboardInterrupt: it found nothing within `GRACE` of a signal to stop.
    """
    _heeding.append(None)
    try:
        since = time.monotonic()
        while not (found := look(LOOK)):
            if patient or not STOP.is_set():
                since = time.monotonic()
            elif time.monotonic() - since > GRACE:
                raise KeyboardInterrupt
        return found
    finally:
        _heeding.pop()
