"""Whether a job has anything left to do, before it starts ranks on every node: chains and arrays drain in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trainer.core.done_file import done_path
from trainer.launch.restart_record import Attempt
from trainer.launch.submit import made_slurm_directory, script_of_job


def finished_since_submission(run_directory: Path, environment: Mapping[str, str]) -> bool:
    """Return whether the run has finished since this job was submitted.

    A run that had finished before is asked for more (``run.steps`` was raised): its ranks know. Times are those of
    files in the run directory, so that no clocks are compared.
    """
    submitted = _submitted_unix(run_directory, environment)
    try:
        return submitted is not None and done_path(run_directory).stat().st_mtime >= submitted
    except OSError:
        return False


def given_up_since_submission(
    run_directory: Path, attempts: list[Attempt], environment: Mapping[str, str]
) -> Attempt | None:
    """Return the end of another job, after this one was submitted, with which the run was given up; None if none.

    What a person submits afterwards begins anew, and what a person puts back into the queue counts no more.
    """
    submitted = _submitted_unix(run_directory, environment)
    if submitted is None:
        return None
    newest = {one.job: one for one in attempts if one.job != environment.get("SLURM_JOB_ID")}
    given_up = [one for one in newest.values() if one.decision == "stop" and one.given_up_unix > submitted]
    return max(given_up, key=lambda one: one.given_up_unix, default=None)


def now_by_files(run_directory: Path) -> float:
    """Return the time by the clock that dates files in the run directory, 0 where none can be written.

    A node's own clock may be ahead of it: the end of a job would seem to be later than the next submission.
    """
    try:
        marker = made_slurm_directory(run_directory) / "gave-up"
        marker.touch()
        return marker.stat().st_mtime
    except OSError:
        return 0.0


def script_name(run_directory: Path, environment: Mapping[str, str]) -> str:
    """Return the file name of the script that this job was submitted with; empty where it is not known."""
    script = _script(run_directory, environment)
    return script.name if script is not None else ""


def _script(run_directory: Path, environment: Mapping[str, str]) -> Path | None:
    job = environment.get("SLURM_ARRAY_JOB_ID") or environment.get("SLURM_JOB_ID", "")
    return script_of_job(run_directory, job)


def _submitted_unix(run_directory: Path, environment: Mapping[str, str]) -> float | None:
    script = _script(run_directory, environment)
    try:
        return script.stat().st_mtime if script is not None else None
    except OSError:
        return None
