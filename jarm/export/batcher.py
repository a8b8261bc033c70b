"""Requests of many threads as few calls: what waits is scored together."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from jarm.core.status import JarmError

Scores = tuple[np.ndarray, np.ndarray]
"""Rewards `[n]` and their deviations over members `[n]`."""


class Busy(JarmError):
    """More texts wait than the queue holds."""


class _Request(NamedTuple):
    texts: list[Any]
    size: int
    future: Future[Scores]


class Batcher:
    """One thread that scores what waits, in the order of its arrival, several requests at a time.

    Example:
      >>> def lengths(texts):
      ...     return np.array([float(len(text)) for text in texts]), np.zeros(len(texts))
      >>> with Batcher(lengths) as batcher:
      ...     futures = [batcher.submit([text]) for text in ("a", "bcd")]
      ...     [float(future.result()[0][0]) for future in futures]
      [1.0, 3.0]
    """

    def __init__(
        self,
        score: Callable[[list[Any]], Scores],
        *,
        size: Callable[[Any], int] = lambda text: 1,
        budget: int = 1 << 16,
        wait: float = 0.002,
        most: int | None = None,
    ):
        """Start the thread.

        Args:
          score: of a list of texts, called in that thread alone.
          size: of a text, in any unit.
          budget: sizes that are scored together, unless one request has more.
          wait: seconds that the first request waits for others.
          most: largest number of texts that wait; a request that finds none waiting may have more. None for
            any number.
        """
        self._score, self._size, self._budget, self._wait, self.most = score, size, budget, wait, most
        self._queue: collections.deque[_Request] = collections.deque()
        self._ready, self._waiting, self._closed = threading.Condition(), 0, False
        self._thread = threading.Thread(target=self._run, name="jarm-batcher", daemon=True)
        self._thread.start()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def waiting(self) -> int:
        """Texts that wait."""
        return self._waiting

    def submit(self, texts: Sequence[Any]) -> Future[Scores]:
        """Ask for the scores of texts.

        Raises:
          Busy: too many texts wait.
          JarmError: the batcher was closed.
        """
        future: Future[Scores] = Future()
        with self._ready:
            if self._closed:
                raise JarmError("The reward model was closed: make another.")
            if self.most is not None and self._waiting and self._waiting + len(texts) > self.most:
                raise Busy(
                    f"{self._waiting:,} texts wait, and {len(texts):,} more are over the {self.most:,} that may: try "
                    "again later."
                )
            self._queue.append(_Request(list(texts), sum(map(self._size, texts)), future))
            self._waiting += len(texts)
            self._ready.notify()
        return future

    def close(self) -> None:
        """Score what waits, and end the thread."""
        with self._ready:
            self._closed = True
            self._ready.notify()
        self._thread.join()

    def _run(self) -> None:
        while requests := self._next():
            if wanted := [request for request in requests if request.future.set_running_or_notify_cancel()]:
                self._answer(wanted)

    def _next(self) -> list[_Request]:
        """The requests of a batch; none once all is done and the batcher is closed."""
        with self._ready:
            self._ready.wait_for(lambda: self._queue or self._closed)
            until = time.monotonic() + self._wait
            while not self._closed and sum(request.size for request in self._queue) < self._budget:
                if not self._ready.wait(max(0.0, until - time.monotonic())):
                    break
            batch, room = list[_Request](), self._budget
            while self._queue and (not batch or self._queue[0].size <= room):
                batch.append(self._queue.popleft())
                room -= batch[-1].size
            self._waiting -= sum(len(request.texts) for request in batch)
            return batch

    def _answer(self, requests: list[_Request]) -> None:
        """Score requests together, or, where that fails, each by itself, so that a fault stays with its own."""
        try:
            rewards, deviations = self._score([text for request in requests for text in request.texts])
        except Exception as error:
            if len(requests) > 1:
                for request in requests:
                    self._answer([request])
            else:
                requests[0].future.set_exception(error)
            return
        ends = np.cumsum([len(request.texts) for request in requests])
        for request, end in zip(requests, ends.tolist(), strict=True):
            part = slice(end - len(request.texts), end)
            request.future.set_result((rewards[part], deviations[part]))
