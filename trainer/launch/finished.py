"""Whether a job has anything left to do, before it starts ranks on every node: chains and arrays drain in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trainer.core.done_file import done_path
from trainer.core.errors import EXIT_DO_NOT_RESTART
from trainer.launch.restart_record import Attempt
from trainer.launch.submit import script_of_job


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
    """Return the end of another job, after this one was submitted, that said "do not restart"; None if there is none.

    What a person submits afterwards begins anew.
    """
    last = attempts[-1] if attempts else None
    if last is None or (last.decision, last.exit_code) != ("stop", EXIT_DO_NOT_RESTART):
        return None
    submitted = _submitted_unix(run_directory, environment)
    other = last.job != environment.get("SLURM_JOB_ID")
    return last if other and submitted is not None and last.time_unix > submitted else None


def _submitted_unix(run_directory: Path, environment: Mapping[str, str]) -> float | None:
    job = environment.get("SLURM_ARRAY_JOB_ID") or environment.get("SLURM_JOB_ID", "")
    script = script_of_job(run_directory, job)
    try:
        return script.stat().st_mtime if script is not None else None
    except OSError:
        return None
