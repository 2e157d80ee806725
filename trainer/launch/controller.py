"""Patience with SLURM's controller: it may be away for minutes while it is restarted or overloaded."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from trainer.core.units import format_duration
from trainer.launch.slurm_commands import SlurmCommandError

_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 30.0
_FINAL = (
    "invalid job id",
    "presently disabled",
    "not permitted",
    "access denied",
    "permission denied",
    "is not installed",
)
"""Answers that another try would get again."""
T = TypeVar("T")


class Patience:
    """Time, shared by all the calls of one decision, for which a silent controller is asked again."""

    def __init__(
        self,
        seconds: float,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._seconds, self._say, self._clock, self._sleep = seconds, say, clock, sleep
        self._deadline: float | None = None

    def ask(self, call: Callable[[], T]) -> T:
        """Return what ``call`` does, trying again with growing pauses while SLURM fails, hangs or refuses.

        The first failure is told, the others are not. Raises the last SlurmCommandError.
        """
        pause = _FIRST_WAIT_SECONDS
        while True:
            try:
                return call()
            except SlurmCommandError as error:
                if _is_final(error):
                    raise
                now = self._clock()
                if self._deadline is None:
                    self._deadline = now + self._seconds
                    self._say(f"{error}; trying again for up to {format_duration(self._seconds)}")
                if now + pause > self._deadline:
                    raise
            self._sleep(pause)
            pause = min(2 * pause, _LONGEST_WAIT_SECONDS)


def _is_final(error: SlurmCommandError) -> bool:
    return any(words in str(error).lower() for words in _FINAL)
