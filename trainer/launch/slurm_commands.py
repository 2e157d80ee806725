"""SLURM's commands, each called in one place, with a time limit and an error a person can act on."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
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


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """What the controller says of a job."""

    state: str
    """RUNNING, COMPLETING, CANCELLED, ..."""
    reason: str
    """TimeLimit where the job was ended by it; most other ends give none."""
    restarts: int
    """Raised as soon as the job is to go back into the queue, while it still ends."""
    nodes: int
    partition: str
    features: str
    """Constraint; empty: none."""
    excluded: str
    """Host list; empty: none."""
    submitted_unix: float | None
    """When it was submitted, or requeued."""


def show_job(job_id: str) -> JobFacts:
    """Return the facts of a job that the controller still knows. Raises SlurmCommandError."""
    answer = _run(["scontrol", "show", "job", _checked(job_id), "-o"], _ASK_SECONDS)
    names = "JobState|Reason|Restarts|NumNodes|Partition|Features|ExcNodeList|SubmitTime"
    fields = dict(re.findall(rf"(?:^|\s)({names})=(\S*)", answer))
    text = {name: "" if value in ("(null)", "None", "N/A", "Unknown") else value for name, value in fields.items()}
    counts = {name: re.match(r"[0-9]{1,9}", text.get(name, "")) for name in ("Restarts", "NumNodes")}
    submitted = None
    with contextlib.suppress(ValueError):
        submitted = datetime.fromisoformat(text.get("SubmitTime", "")).timestamp()
    return JobFacts(
        state=text.get("JobState", ""),
        reason=text.get("Reason", ""),
        restarts=int(counts["Restarts"][0]) if counts["Restarts"] else 0,
        nodes=int(counts["NumNodes"][0]) if counts["NumNodes"] else 0,  # "2" or "2-4"
        partition=text.get("Partition", ""),
        features=text.get("Features", ""),
        excluded=text.get("ExcNodeList", ""),
        submitted_unix=submitted,
    )


@dataclass(frozen=True)
class Node:
    """A node as the controller sees it."""

    name: str
    state: str
    features: frozenset[str]

    @property
    def lost(self) -> bool:
        """Whether it is down or does not answer."""
        return self.state.startswith(("down", "fail", "unk")) or "*" in self.state

    @property
    def usable(self) -> bool:
        """Whether jobs may be put on it, now or when others have ended."""
        return not self.lost and self.state.startswith(("idle", "mix", "alloc", "comp", "plnd", "resv"))


def nodes_of(*, partition: str | None = None, names: Sequence[str] = ()) -> list[Node]:
    """Return the nodes of a partition (or several, with commas), or those named. Raises SlurmCommandError."""
    choice = ["-p", partition] if partition else []
    choice += ["-n", ",".join(names)] if names else []
    answer = _run(["sinfo", "-h", "-N", *choice, "-o", "%N|%t|%f"], _ASK_SECONDS)
    found: dict[str, Node] = {}
    for line in answer.splitlines():
        name, state, features = (*line.strip().split("|"), "", "")[:3]
        found[name] = Node(name, state.lower(), frozenset(features.split(",")))
    return list(found.values())


def queue_state(job_id: str) -> str | None:
    """Return the state of a job as squeue gives it, None when the queue no longer has it. Raises SlurmCommandError."""
    try:
        answer = _run(["squeue", "-h", "-t", "all", "-j", _checked(job_id), "-o", "%T"], _ASK_SECONDS)
    except SlurmRefusedError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return answer.split("\n")[0].strip() or None


def requeue_job(job_id: str) -> None:
    """Put a job back into the queue. Raises SlurmCommandError."""
    _run(["scontrol", "requeue", _checked(job_id)], _ASK_SECONDS)


def exclude_nodes(job_id: str, hosts: Sequence[str]) -> None:
    """Let a job that waits in the queue, or is on its way there, avoid exactly ``hosts``. Raises SlurmCommandError."""
    _run(["scontrol", "update", f"JobId={_checked(job_id)}", f"ExcNodeList={','.join(hosts)}"], _ASK_SECONDS)


def _checked(job_id: str) -> str:
    if not is_job_id(job_id):
        raise SlurmCommandError(f"{job_id!r} is not a SLURM job id")
    return job_id


def _run(command: list[str], seconds: float) -> str:
    # The variables of a job we run in (SLURM_NTASKS...) would steer the new one. The cluster's address and a site's
    # defaults (SBATCH_ACCOUNT...) stay.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") or name in ("SLURM_CONF", "SLURM_CLUSTERS")
    }
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
