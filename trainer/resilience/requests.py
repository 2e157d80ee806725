"""What a rank asks of all when a step begins: gathered from everything that may ask. The loop knows no other."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from trainer.engine.base import Requests, StepResult
from trainer.resilience.control import Control, Save, Stop
from trainer.resilience.deadline import Deadline
from trainer.resilience.signals import StopFlag


class Saves(Protocol):
    """What is asked of the run's saver."""

    @property
    def must_stop(self) -> bool:
        """Whether a failed save ends the run."""
        ...

    @property
    def newest(self) -> Save | None:
        """The last save that has ended."""
        ...


class RequestSources:
    """Signals on every rank; on rank 0 also the time limit, RUN/stop, RUN/control.json and a lost run directory."""

    def __init__(
        self,
        signals: StopFlag,
        *,
        control: Control | None = None,
        deadline: Deadline | None = None,
        lost: Callable[[], bool] = lambda: False,
    ) -> None:
        """``control``, ``deadline`` and ``lost`` are given on rank 0 alone."""
        self._signals = signals
        self._control = control
        self._deadline = deadline
        self._lost = lost
        self._saves: Saves | None = None
        self._time_limit: str | None = None
        self._by_person = False

    def begin(self, step: int, saves: Saves) -> None:
        """Begin a run of which ``step`` steps are done and that is saved by ``saves``."""
        self._saves = saves
        if self._control is not None:
            self._control.begin(step)

    def ask(self, step: int, *, evaluation_due: bool) -> Requests:
        """Return what this rank asks for as ``step`` begins, after which an evaluation may be due."""
        saves, log_level = False, 0
        stop = by_person = None
        if self._control is not None:
            saves, log_level = self._control.look(step, self._saves.newest if self._saves else None)
            stop = self._control.stop
            by_person = stop is not None and stop.by_person
        if self._deadline is not None and self._time_limit is None:
            left = self._deadline.seconds_left(evaluation_due=evaluation_due)
            self._time_limit = None if left is None else f"time limit in {max(0.0, left):.0f} s"
        failed = self._saves is not None and self._saves.must_stop
        asked = stop or self._signals.received or self._time_limit or failed or self._lost()
        return Requests(
            stop=bool(asked),
            by_person=bool(by_person or self._signals.by_person),
            save=saves,
            log_level=log_level,
        )

    def heed(self, result: StepResult) -> bool:
        """Do what all ranks were asked for in the step that is over; return whether the run ends here."""
        if result.log_level:
            logging.getLogger().setLevel(result.log_level)
        self._by_person = result.person_requests > 0
        return result.stop_requests > 0

    def finish(self) -> None:
        """Say what became of a save that was asked for."""
        if self._control is not None and self._saves is not None:
            self._control.finish(self._saves.newest)

    @property
    def ending(self) -> Stop:
        """Why the run was stopped, as far as this rank knows. A person's word counts before a scheduler's."""
        control = self._control.stop if self._control is not None else None
        if control is not None and control.by_person:
            return control
        if self._by_person:
            return Stop(f"asked to stop ({self._signals.by_person or 'another rank'})", by_person=True)
        if self._signals.received is not None:
            return Stop(f"asked to stop ({self._signals.received})", by_person=False)
        return control or Stop(self._time_limit or "asked to stop (another rank)", by_person=False)
