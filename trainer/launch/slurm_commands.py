"""SLURM's commands, each called in one place, with a time limit and an error a person can act on."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from trainer.core.errors import TrainerError

_SUBMIT_SECONDS = 60.0
"""A busy controller answers late; after a time-out the job may or may not be queued, so this is generous."""
_ASK_SECONDS = 15.0
_JOB_ID = re.compile(r"[0-9]{1,12}(?:_[0-9]{1,9})?")


class SlurmCommandError(TrainerError):
    """A SLURM command is missing, refused, or did not answer."""


class SlurmRefusedError(SlurmCommandError):
    """The controller answered, and said no."""


def is_job_id(text: str) -> bool:
    """Return whether ``text`` is a job id, or that of an array task."""
    return _JOB_ID.fullmatch(text) is not None


def submit_script(script: Path) -> str:
    """Hand ``script`` to sbatch and return the job id. Raises SlurmCommandError."""
    answer = _run(["sbatch", "--parsable", str(script)], _SUBMIT_SECONDS)
    job_id = answer.strip().split("\n")[-1].split(";")[0]  # "id;cluster" on a federation
    if not is_job_id(job_id):
        raise SlurmCommandError(f"sbatch answered {answer.strip()!r} instead of a job id")
    return job_id


def show_state(job_id: str) -> tuple[str, str]:
    """Return (state, reason) of a job that the controller still knows. Raises SlurmCommandError."""
    answer = _run(["scontrol", "show", "job", _checked(job_id), "-o"], _ASK_SECONDS)
    fields = dict(re.findall(r"(?:^|\s)(JobState|Reason)=(\S*)", answer))
    return fields.get("JobState", ""), fields.get("Reason", "")


def queue_state(job_id: str) -> str | None:
    """Return the state of a job as squeue gives it, None when the queue no longer has it. Raises SlurmCommandError."""
    try:
        answer = _run(["squeue", "-h", "-t", "all", "-j", _checked(job_id), "-o", "%T"], _ASK_SECONDS)
    except SlurmRefusedError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return answer.split("\n")[0].strip() or None


def job_end_unix(job_id: str) -> float | None:
    """Return when SLURM ends a job, in seconds since 1970, None where it doesn't say. Raises SlurmCommandError."""
    answer = _run(["scontrol", "show", "job", _checked(job_id), "-o"], _ASK_SECONDS, SLURM_TIME_FORMAT="%s")
    found = re.search(r"(?:^|\s)EndTime=([0-9]{1,12})(?:\s|$)", answer)
    return float(found[1]) if found else None


def requeue_job(job_id: str) -> None:
    """Put a job back into the queue. Raises SlurmCommandError."""
    _run(["scontrol", "requeue", _checked(job_id)], _ASK_SECONDS)


def _checked(job_id: str) -> str:
    if not is_job_id(job_id):
        raise SlurmCommandError(f"{job_id!r} is not a SLURM job id")
    return job_id


def _run(command: list[str], seconds: float, **variables: str) -> str:
    # The variables of a job we run in (SLURM_NTASKS...) would steer the new one. The cluster's address and a site's
    # defaults (SBATCH_ACCOUNT...) stay.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") or name in ("SLURM_CONF", "SLURM_CLUSTERS")
    } | variables
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds, env=environment, check=False
        )
    except FileNotFoundError:
        raise SlurmCommandError(
            f"{command[0]} is not installed here: run this on a login node of the cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmCommandError(f"{command[0]} did not answer within {seconds:.0f} s: is the controller up?") from None
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        raise SlurmRefusedError(f"{command[0]} refused: {said}")
    return done.stdout
