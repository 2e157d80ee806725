"""What a person asks of a run through RUN/control.json and RUN/stop; only rank 0 looks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from trainer.core.control_file import (
    LOG_LEVELS,
    Command,
    ControlFileError,
    control_path,
    fingerprint,
    read_command,
    stop_file_problem,
    stop_path,
)

_SECONDS_BETWEEN_LOOKS = 1.0
"""On a network file system each look may be a question to its server."""
State = Literal["accepted", "done", "refused", "failed"]


@dataclass(frozen=True)
class Stop:
    """Why a run ends."""

    reason: str
    by_person: bool


@dataclass(frozen=True)
class Save:
    """How a save has ended."""

    step: int
    error: str | None


class Control:
    """Reads commands, acts on each once, and says what became of it.

    status.json keeps the id of the last one and the step of a pending stop-after, so that a restart neither obeys a
    command again nor forgets the stop.
    """

    def __init__(
        self,
        run_directory: Path,
        total_steps: int,
        before: Mapping[str, Any],
        note: Callable[..., None],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``before`` is status.json of the start before, ``note`` changes fields of it; ``say`` tells people."""
        self._run, self._total_steps = run_directory, total_steps
        self._note, self._say, self._clock = note, say, clock
        noted: object = before.get("control")
        self._handled: object = cast("dict[str, object]", noted).get("id") if isinstance(noted, dict) else None
        stop_step = before.get("stop_step")
        self._stop_step: int | None = stop_step if type(stop_step) is int else None
        self._looked_at = -_SECONDS_BETWEEN_LOOKS
        self._seen: object = None
        self._warned: set[str] = set()
        self._saving: tuple[Command, int] | None = None
        self._log_level = 0
        self._asked: Stop | None = None
        self._told = False
        self.stop: Stop | None = None
        """Why the run is to end after the step that was looked at last, None: it isn't."""

    def begin(self, step: int) -> None:
        """Say what is still asked for by an earlier start; ``step`` steps are done."""
        if self._stop_step is None:
            return
        if self._stop_step <= step:
            self._stop_step = None
        else:
            self._say(f"trainer control stop-after {self._stop_step} is still to be done; withdraw it with clear")
        self._note(stop_step=self._stop_step)

    def look(self, step: int, newest_save: Save | None) -> tuple[bool, int]:
        """Look for commands before ``step`` begins; return whether to save after it, and a log level or 0.

        ``newest_save`` is the last save that has ended.
        """
        self._finish_save(newest_save)
        saves, self._log_level = False, 0
        now = self._clock()
        if now - self._looked_at >= _SECONDS_BETWEEN_LOOKS:
            self._looked_at = now
            self._look_for_stop_file()
            command = self._new_command()
            if command is not None:
                saves = self._act(command, step)
        if self._saving is not None and step <= self._saving[1]:  # the run went back before it could save
            self._saving, saves = (self._saving[0], step), True
        self.stop = self._asked
        if self._stop_step is not None and step >= self._stop_step and (self.stop is None or not self.stop.by_person):
            self.stop = Stop(f"trainer control stop-after {self._stop_step}", by_person=True)
        if self.stop is not None and self.stop.by_person and not self._told:
            # Already now: the job stays ended even where nobody lives to say how the last save went.
            self._told = True
            self._note(requeue=False)
        return saves, self._log_level

    def finish(self, newest_save: Save | None) -> None:
        """Say what became of a save that was still under way."""
        self._finish_save(newest_save)

    def _look_for_stop_file(self) -> None:
        problem = stop_file_problem(self._run)
        if problem:
            self._warn(f"{stop_path(self._run)} is ignored: it {problem}")
        elif problem == "" and (self._asked is None or not self._asked.by_person):
            self._asked = Stop(f"stop file {stop_path(self._run)}", by_person=True)

    def _new_command(self) -> Command | None:
        path = control_path(self._run)
        found = fingerprint(path)
        if found is None or found == self._seen:
            return None
        self._seen = found
        try:
            command = read_command(self._run)
        except ControlFileError as error:
            self._warn(f"{path} is ignored: {error}")
            return None
        if command is None or command.id == self._handled:
            return None
        return command

    def _act(self, command: Command, step: int) -> bool:
        """Do what is asked for; return whether that is a save after ``step``."""
        self._handled = command.id
        if command.action == "save":
            self._saving = command, step
            self._answer(command, "accepted", f"saving after step {step}")
            return True
        if command.action == "stop":
            if self._asked is None or not self._asked.by_person:
                self._asked = Stop(f"trainer control stop by {command.who}", by_person=not command.requeue)
            self._answer(command, "accepted", f"stopping after step {step}")
        elif command.action == "log-level":
            self._log_level = LOG_LEVELS[str(command.value)]
            self._answer(command, "done", f"log level {command.value} from step {step} on")
        elif command.action == "clear":
            forgotten, self._stop_step = self._stop_step, None
            what = "nothing was pending" if forgotten is None else f"stop-after {forgotten} withdrawn"
            self._answer(command, "done", what, stop_step=None)
        else:
            self._stop_after(command, int(command.value or 0), step)
        return False

    def _stop_after(self, command: Command, last: int, step: int) -> None:
        if last < step:
            self._answer(command, "refused", f"step {last} is over: {step - 1} are done")
        elif last >= self._total_steps:
            self._answer(command, "refused", f"the run ends at step {self._total_steps} in any case")
        else:
            self._stop_step = last
            self._answer(command, "accepted", f"stopping after step {last}", stop_step=last)

    def _finish_save(self, newest: Save | None) -> None:
        if self._saving is None or newest is None or newest.step < self._saving[1]:
            return
        command, _ = self._saving
        self._saving = None
        if newest.error is None:
            self._answer(command, "done", f"saved step {newest.step}")
        else:
            self._answer(command, "failed", newest.error)

    def _answer(self, command: Command, state: State, outcome: str, **changes: Any) -> None:
        value = "" if command.value is None else f" {command.value}"
        self._say(f"trainer control {command.action}{value} by {command.who}: {outcome}")
        about = {"id": command.id, "action": command.action, "value": command.value, "who": command.who}
        self._note(control={**about, "state": state, "outcome": outcome}, **changes)

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._say(f"warning: {text}")
