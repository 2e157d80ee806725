"""What the run directory says of how an attempt of a SLURM job ended."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from trainer.checkpoint.layout import step_directories
from trainer.core.hostlist import expand_hostlist, expand_tasks_per_node, fills_hosts
from trainer.core.run_lock import holder
from trainer.core.slurm_job import controller_id
from trainer.core.status_file import read_status, write_status

_CLOCK_SLACK_SECONDS = 5.0
"""The run directory's server and the hosts don't quite agree about the time."""


@dataclass(frozen=True, kw_only=True)
class JobPlace:
    """Which start of which job this is: SLURM's variables."""

    job: str
    """SLURM_JOB_ID, by which records name it."""
    restart: int
    nodes: str
    """Host list."""
    tasks_per_node: str = ""
    distribution: str = ""
    """How srun deals ranks out to nodes; empty: its default."""
    task: str = ""
    """Id for SLURM's commands; empty: that of the job."""

    @classmethod
    def here(cls, environment: Mapping[str, str]) -> JobPlace:
        """Return where the batch script runs."""
        restarts = environment.get("SLURM_RESTART_COUNT", "")
        return cls(
            job=environment.get("SLURM_JOB_ID", ""),
            restart=int(restarts) if restarts.isdecimal() else 0,
            nodes=environment.get("SLURM_JOB_NODELIST", ""),
            tasks_per_node=environment.get("SLURM_TASKS_PER_NODE", ""),
            distribution=environment.get("SLURM_DISTRIBUTION", ""),
            task=controller_id(environment),
        )

    @property
    def own_id(self) -> str:
        """The id by which SLURM's commands mean this job alone."""
        return self.task or self.job

    def hosts(self) -> list[str]:
        """Return the nodes of the job."""
        with contextlib.suppress(ValueError):
            return expand_hostlist(self.nodes) if self.nodes else []
        return []

    def hosts_of_ranks(self) -> dict[int, str]:
        """Return the node of each rank; empty where it can't be told."""
        if not fills_hosts(self.distribution):
            return {}
        try:
            counts = expand_tasks_per_node(self.tasks_per_node)
        except ValueError:
            return {}
        return dict(enumerate(host for host, n in zip(self.hosts(), counts, strict=False) for _ in range(n)))


def own_status(run_directory: Path, place: JobPlace, since_unix: float) -> dict[str, Any] | None:
    """Return status.json if this start of this job wrote it, None otherwise.

    The facts of the run's attempt name its job; where they don't (ranks without SLURM's variables), it must have been
    written since ``since_unix``.
    """
    status = read_status(run_directory)
    if status is None:
        return None
    variables = _variables(run_directory, status.get("attempt"))
    if "SLURM_JOB_ID" in variables:
        restart = variables.get("SLURM_RESTART_COUNT") or "0"
        return status if (variables["SLURM_JOB_ID"], restart) == (place.job, str(place.restart)) else None
    updated = status.get("updated_unix")
    recent = isinstance(updated, int | float) and updated >= since_unix - _CLOCK_SLACK_SECONDS
    return status if recent else None


def _variables(run_directory: Path, attempt: object) -> dict[str, Any]:
    if type(attempt) is not int:
        return {}
    try:
        path = run_directory / "attempts" / f"{attempt:04d}" / "environment.json"
        content: object = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    variables = cast("dict[str, object]", content).get("variables") if isinstance(content, dict) else None
    return cast("dict[str, Any]", variables) if isinstance(variables, dict) else {}


def newest_step(run_directory: Path) -> int:
    """Return the step of the newest committed checkpoint, 0 where there is none."""
    return max((step for step, _ in step_directories(run_directory)), default=0)


def say_failed(run_directory: Path, exit_code: int, reason: str, *, ranks_started: bool) -> None:
    """Write into status.json how a run ended that could not say so itself, unless a process still trains there.

    Without ``ranks_started`` it is the end of no start of the run: the newest ended earlier, before a wait perhaps.
    """
    if holder(run_directory, watch=False) is not None:
        return
    fields = read_status(run_directory) or {}
    if not ranks_started:
        fields.pop("attempt", None)
    write_status(run_directory, {**fields, "state": "failed", "exit_code": exit_code, "reason": reason})
