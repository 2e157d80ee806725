"""Whether the step that is about to begin must be the last before the time limit. Pure, but for the clock."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

_RECENT_STEPS = 10
MARGIN_SECONDS = 10.0
"""For what is measured by nobody: the way of a signal, clocks that differ, the end of the ranks."""


@dataclass
class Durations:
    """What this attempt has measured so far, in seconds."""

    steps: deque[float] = field(default_factory=lambda: deque[float](maxlen=_RECENT_STEPS))
    """Recent steps."""
    evaluation: float | None = None
    """The newest evaluation, all sources together."""
    save: float | None = None
    """The newest save, from the call until all was durable."""
    _evaluated_step: int = -1

    def note_step(self, seconds: float) -> None:
        """Note a step."""
        self.steps.append(seconds)

    def note_evaluation(self, step: int, seconds: float) -> None:
        """Note the evaluation of one source; those of the same step add up."""
        before = self.evaluation if step == self._evaluated_step and self.evaluation is not None else 0.0
        self.evaluation, self._evaluated_step = before + seconds, step

    def note_save(self, seconds: float) -> None:
        """Note a committed save."""
        self.save = seconds


def lead_seconds(durations: Durations, *, evaluation_due: bool, unmeasured_seconds: float) -> float:
    """Return how long before the end the last step must begin.

    Once for the step and what follows it, and as much again: the next chance to stop comes after both. What was not
    measured yet makes it at least ``unmeasured_seconds``.
    """
    step = max(durations.steps, default=None)
    parts = [step, durations.save, *([durations.evaluation] if evaluation_due else [])]
    lead = 2 * sum(part for part in parts if part is not None)
    return (max(lead, unmeasured_seconds) if None in parts else lead) + MARGIN_SECONDS


class Deadline:
    """Watches the time limit."""

    def __init__(
        self,
        end_unix: Callable[[], float | None],
        durations: Durations,
        unmeasured_seconds: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``end_unix`` returns when the job ends as far as is known now, in seconds since 1970; it must not block."""
        self._end_unix = end_unix
        self._durations = durations
        self._unmeasured_seconds = unmeasured_seconds
        self._clock = clock

    def seconds_left(self, *, evaluation_due: bool) -> float | None:
        """Return the seconds to the time limit if the step about to begin must be the last one, None: it needn't."""
        end = self._end_unix()
        if end is None:
            return None
        left = end - self._clock()
        lead = lead_seconds(self._durations, evaluation_due=evaluation_due, unmeasured_seconds=self._unmeasured_seconds)
        return left if left < lead else None
