"""Ask a running trainer for something through RUN/control.json, and wait until it says what became of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from trainer.core.control_file import Command, stop_path, withdraw_command, write_command
from trainer.core.errors import Problem, RefusedError
from trainer.core.run_lock import holder
from trainer.core.status_file import read_status
from trainer.launch.sweep_file import read_sweep

_POLL_SECONDS = 0.2
_LIVE_SECONDS = 2.0
"""Between two looks at whether the run still lives."""


@dataclass(frozen=True)
class Answer:
    """What became of a command."""

    text: str
    good: bool
    """Accepted or done."""


def ask_run(run_directory: Path, command: Command, *, wait_seconds: float) -> Answer:
    """Hand ``command`` to the run and wait at most so long for its answer; 0: do not wait.

    A save is waited for until it has ended, anything else until it is accepted. Raises RefusedError, with nothing
    written, where no run is running.
    """
    _refuse_if_none_runs(run_directory)
    write_command(run_directory, command)
    if wait_seconds <= 0:
        return Answer("handed to the run; `trainer control RUN_DIR status` shows what becomes of it", good=True)
    end, looked = time.monotonic() + wait_seconds, time.monotonic()
    said: dict[str, Any] | None = None
    while time.monotonic() < end:
        said = _answer_to(run_directory, command)
        if said is not None and (said.get("state") != "accepted" or command.action != "save"):
            return Answer(str(said.get("outcome")), good=said.get("state") in ("accepted", "done"))
        if time.monotonic() - looked > _LIVE_SECONDS:
            if holder(run_directory, watch=False) is None and _has_ended(run_directory):
                break
            looked = time.monotonic()
        time.sleep(_POLL_SECONDS)
    return _unanswered(run_directory, command, said, wait_seconds)


def noted(run_directory: Path) -> str:
    """Return in words what was last asked of the run and what is still to be done."""
    status = read_status(run_directory) or {}
    control, stop_step = status.get("control"), status.get("stop_step")
    lines = ["nothing was asked of this run"]
    if isinstance(control, dict):
        said = cast("dict[str, Any]", control)
        value = "" if said.get("value") is None else f" {said.get('value')}"
        lines = [f"{said.get('action')}{value} by {said.get('who')}: {said.get('state')}, {said.get('outcome')}"]
    if stop_step is not None:
        lines.append(f"stop-after {stop_step} is still to be done")
    if stop_path(run_directory).exists():
        lines.append(f"{stop_path(run_directory)} exists: the run ends, and does not start")
    return "\n".join(lines)


def _refuse_if_none_runs(run_directory: Path) -> None:
    if not run_directory.is_dir():
        raise RefusedError(f"{run_directory} is not a directory → give the run.directory of a recipe")
    sweep = read_sweep(run_directory)
    if sweep is not None:
        fix = f"name one, e.g. {run_directory / sweep.tasks[0].name}, or end all: trainer cancel --all"
        raise RefusedError(f"{run_directory} is a sweep of {len(sweep.tasks)} runs → {fix}")
    if holder(run_directory) is None:
        rule = "no run is running here: nobody would answer"
        fix = f"touch {stop_path(run_directory)} to keep it from starting"
        raise RefusedError(Problem(str(run_directory), None, rule, fix))


def _answer_to(run_directory: Path, command: Command) -> dict[str, Any] | None:
    control = (read_status(run_directory) or {}).get("control")
    if not isinstance(control, dict):
        return None
    said = cast("dict[str, Any]", control)
    return said if said.get("id") == command.id else None


def _has_ended(run_directory: Path) -> bool:
    """Return whether the run says so itself: its lock is let go of after the last status."""
    return (read_status(run_directory) or {}).get("state") != "running"


def _unanswered(run_directory: Path, command: Command, said: dict[str, Any] | None, seconds: float) -> Answer:
    said = _answer_to(run_directory, command) or said
    if said is not None:
        good = said.get("state") == "done"
        more = "" if good else f"; nothing more within {seconds:.0f} s"
        return Answer(f"{said.get('outcome')}{more}", good=good)
    if holder(run_directory, watch=False) is None and _has_ended(run_directory):
        withdraw_command(run_directory, command)
        return Answer("the run ended before it saw the request, which was withdrawn", good=False)
    return Answer(f"no answer within {seconds:.0f} s; the run acts on it when its next step begins", good=False)
