"""A thread that reads the next steps while the current one is computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Take steps, without end, from an iterator that reads them, at most ``depth`` ahead.

    One thread, one queue: the order can't change, and memory is bounded by ``depth`` steps. What reading raises is
    raised by ``get`` in its turn, and again by every later ``get``.
    """

    def __init__(self, source: Iterator[T], depth: int) -> None:
        self._source = source
        self._steps: queue.Queue[T | _Failure] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._failure: _Failure | None = None
        self._thread = threading.Thread(target=self._run, name="data-read-ahead", daemon=True)
        self._thread.start()

    def get(self) -> T:
        """Return the next step."""
        if self._stop.is_set():
            raise ValueError("the loader is closed")
        if self._failure is None:
            item = self._steps.get()
            if not isinstance(item, _Failure):
                return item
            self._failure = item
        raise self._failure.error

    def close(self) -> None:
        """Stop reading; returns once the thread has ended."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                item: T | _Failure = next(self._source)
            except BaseException as error:  # noqa: BLE001 (raised again by get, in the training thread)
                item = _Failure(error)
            self._put(item)
            if isinstance(item, _Failure):
                return

    def _put(self, item: T | _Failure) -> None:
        while not self._stop.is_set():
            try:
                self._steps.put(item, timeout=0.1)
            except queue.Full:  # the trainer is busy: look whether it wants to stop, then wait on
                continue
            return


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error
