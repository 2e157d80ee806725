"""Stop requests: a handler sets a flag; the engine sums the ranks' flags with the target counts of the next step."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_BY_PERSONS = (signal.SIGINT, signal.SIGHUP)
"""A keyboard or a closed terminal: no scheduler sends these."""
_SAME_INTERRUPT_SECONDS = 0.5
_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
"""One of these is in the environment of every rank, and of some other processes."""
_EXIT_INTERRUPTED = 128 + signal.SIGINT


class StopFlag:
    """Remembers the first stop signal of this rank; the training loop asks for it at step boundaries.

    SIGTERM may come any number of times (SLURM repeats it while it waits) and never cuts a save short. Only a second
    SIGINT, more than 0.5 s after the first, ends the process at once (exit code 130): that is a person at a keyboard.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._previous: dict[signal.Signals, Any] = {}
        self._signal: signal.Signals | None = None
        self._time_unix: float | None = None
        self._interrupted_at: float | None = None
        self._by_person: signal.Signals | None = None

    @property
    def by_person(self) -> str | None:
        """Name of the first signal that came from a person at a terminal, whatever came before it."""
        return self._by_person.name if self._by_person is not None else None

    @property
    def received(self) -> str | None:
        """Name of the first stop signal that reached this rank, e.g. "SIGUSR1"."""
        return self._signal.name if self._signal is not None else None

    @property
    def received_unix(self) -> float | None:
        """When it came, in seconds since 1970."""
        return self._time_unix

    def install(self) -> None:
        """Install the handlers, once; call from the main thread. SIGHUP stays ignored under nohup."""
        if self._previous:
            return
        for signum in _STOP_SIGNALS:
            if signum is signal.SIGHUP and signal.getsignal(signum) is signal.SIG_IGN:
                continue
            self._previous[signum] = signal.signal(signum, self._handle)

    def restore(self) -> None:
        """Put back the handlers that `install` replaced."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()

    def pass_on(self) -> None:
        """Restore what `install` replaced and let the signal that came meanwhile do what it would have done."""
        self.restore()
        if self._signal is not None:
            os.kill(os.getpid(), self._signal)

    def __enter__(self) -> StopFlag:
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        now = self._clock()
        if signum == signal.SIGINT:
            if self._interrupted_at is not None and now - self._interrupted_at > _SAME_INTERRUPT_SECONDS:
                _stop_now()
            if self._interrupted_at is None:
                self._interrupted_at = now
        if self._by_person is None and signum in _BY_PERSONS:
            self._by_person = signal.Signals(signum)
        if self._signal is None:
            self._signal = signal.Signals(signum)
            self._time_unix = time.time()


def early_stop_flag(environment: Mapping[str, str], arguments: Sequence[str]) -> StopFlag | None:
    """Install handlers where this may be a rank's `trainer train`, before the imports that take its first seconds.

    Until then a signal kills the rank, and one rank that is gone fails the job.
    """
    if arguments[1:2] != ["train"] or not any(name in environment for name in _RANKS):
        return None
    flag = StopFlag()
    flag.install()
    return flag


def _stop_now() -> None:
    """Leave without unwinding: a collective that other ranks have left never returns."""
    for stream in (sys.stdout, sys.stderr):
        # The handler may have interrupted a write of the same stream (RuntimeError: reentrant call).
        with contextlib.suppress(RuntimeError, OSError, ValueError):
            stream.flush()
    os._exit(_EXIT_INTERRUPTED)
