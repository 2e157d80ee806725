"""Withdraw a stop that no run has seen: what a person starts afterwards is not to end by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from trainer.core.control_file import Command, ControlFileError, read_command, withdraw_command
from trainer.core.run_lock import holder
from trainer.core.status_file import read_status
from trainer.launch.queue import ask_queue
from trainer.launch.submit import recorded_jobs


def withdraw_stale_stop(run_directory: Path, say: Callable[[str], None]) -> None:
    """Withdraw the stop in RUN/control.json that was meant for an attempt which ended by itself.

    It stays while a run is there that it may have been meant for: one that trains, and a job that waits, starts or
    goes back into the queue. Where SLURM can't be asked there is none.
    """
    command = _unseen_stop(run_directory)
    if command is None or holder(run_directory) is not None:
        return
    ids = recorded_jobs(run_directory)
    if ids and any(not job.ended for job in ask_queue(ids).of(ids)):
        return
    withdraw_command(run_directory, command)
    say(f"{run_directory}: the stop that {command.who} asked for came after the end of the run before: withdrawn")


def is_started_again(environment: Mapping[str, str]) -> bool:
    """Return whether SLURM runs this job again: a stop that was asked for in between is meant for it."""
    return environment.get("SLURM_RESTART_COUNT", "0") != "0"


def _unseen_stop(run_directory: Path) -> Command | None:
    try:
        command = read_command(run_directory)
    except ControlFileError:  # the run says so, and passes it over
        return None
    if command is None or command.action != "stop":
        return None
    noted: object = (read_status(run_directory) or {}).get("control")
    seen = cast("dict[str, object]", noted).get("id") if isinstance(noted, dict) else None
    return command if command.id != seen else None
