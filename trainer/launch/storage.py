"""File system calls of a process that must not wait for a file system: from one thread, each with a time limit."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_SLICE_SECONDS = 0.05


class Storage:
    """Runs actions in a thread of its own, one after the other.

    The thread starts with the first action and stays, so that none is lost to "can't start new thread" later on; until
    it could be started actions count as unanswered.
    """

    def __init__(self, between: Callable[[], None]) -> None:
        """``between`` is called again and again while an action is waited for: a signal may have come."""
        self._between = between
        self._actions: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._answered = threading.Event()
        self._answered.set()

    def ask(self, action: Callable[[], T], otherwise: T, seconds: float) -> T:
        """Return what ``action`` does; ``otherwise`` if it fails, or there is no answer in ``seconds``.

        While an earlier action is without an answer nothing is waited for.
        """
        if not self._answered.is_set() or not self._runs():
            return otherwise
        found: list[T] = []
        answered = self._answered = threading.Event()

        def act() -> None:
            try:
                with contextlib.suppress(OSError):
                    found.append(action())
            except Exception as error:  # noqa: BLE001 - the thread must go on
                print(f"trainer: the watchdog failed to look at its files: {error!r}", file=sys.stderr)
            finally:
                answered.set()

        self._actions.put(act)
        end = time.monotonic() + seconds
        while not answered.wait(_SLICE_SECONDS) and time.monotonic() < end:
            self._between()
        return found[0] if found else otherwise

    def _runs(self) -> bool:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="storage", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads, for now
                return False
            self._thread = thread
        return True

    def _run(self) -> None:
        while True:
            self._actions.get()()
