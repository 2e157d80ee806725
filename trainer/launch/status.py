"""Where a run stands, read from its directory and from SLURM. Reads only, and copes with anything half-written."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from trainer.checkpoint.layout import step_directories
from trainer.core.errors import RefusedError
from trainer.core.run_lock import holder
from trainer.core.status_file import read_status
from trainer.core.units import format_count, format_duration
from trainer.launch.slurm_commands import SlurmCommandError, queue_state
from trainer.launch.submit import recorded_jobs
from trainer.telemetry.attempt_files import read_attempts
from trainer.telemetry.goodput import goodput, split_text

_RECENT_STEPS = 20
"""Steps whose mean time the remaining time is estimated from."""


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """What `trainer status` shows; None where it is not known (yet)."""

    run_directory: str
    state: str | None
    """running, finished, stopped or failed, as the run last said; killed where it could not say."""
    step: int | None
    total_steps: int | None
    checkpoints: list[int]
    """Steps of the committed checkpoints, oldest first."""
    restarts: int | None
    exit_code: int | None
    reason: str | None
    updated_unix: float | None
    loss: float | None
    best_validation_loss: float | None
    best_step: int | None
    tokens_per_second: float | None
    remaining_seconds: float | None
    goodput_fraction: float | None
    """Time in steps that count, over the time that was allocated to the run."""
    goodput: dict[str, Any] | None
    """Where all of the time went, as in status.json."""
    job_id: str | None
    job_state: str | None
    """As squeue says it (PENDING, RUNNING...); None when the queue no longer has the job."""
    job_note: str | None
    """Why ``job_state`` is unknown."""

    def to_json(self) -> str:
        """Return one JSON object."""
        return json.dumps(asdict(self), indent=2)


def collect(run_directory: Path) -> RunStatus:
    """Return where the run in ``run_directory`` stands. Raises RefusedError where there is no run."""
    if not run_directory.is_dir():
        raise RefusedError(f"{run_directory} is not a directory → give the run.directory of a recipe")
    said = read_status(run_directory)
    jobs = recorded_jobs(run_directory)
    metrics = _read_metrics(run_directory / "metrics.jsonl")
    checkpoints = [step for step, _ in step_directories(run_directory)]
    if said is None and not jobs and metrics is None and not checkpoints:
        raise RefusedError(f"{run_directory} holds no run: no status.json, metrics.jsonl, checkpoint or SLURM job")
    fields = said or {}
    metrics = metrics or _Metrics()
    steps = [step for step in (_whole(fields.get("step")), metrics.step) if step is not None]
    step, total = max(steps, default=None), _whole(fields.get("total_steps"))
    remaining = None
    if fields.get("state") == "running" and step is not None and total is not None and metrics.step_seconds is not None:
        remaining = max(0, total - step) * metrics.step_seconds
    job_state, job_note = _job_state(jobs[-1]) if jobs else (None, None)
    spent = goodput(read_attempts(run_directory))
    return RunStatus(
        run_directory=str(run_directory),
        state=_living_state(run_directory, _text(fields.get("state")), job_state),
        step=step,
        total_steps=total,
        checkpoints=checkpoints,
        restarts=_whole(fields.get("restarts")),
        exit_code=_whole(fields.get("exit_code")),
        reason=_text(fields.get("reason")),
        updated_unix=_number(fields.get("updated_unix")),
        loss=metrics.loss,
        best_validation_loss=_number(fields.get("best_validation_loss")),
        best_step=_whole(fields.get("best_step")),
        tokens_per_second=metrics.tokens_per_second,
        remaining_seconds=remaining,
        goodput_fraction=spent.fraction if spent else None,
        goodput=spent.to_json() if spent else None,
        job_id=jobs[-1] if jobs else None,
        job_state=job_state,
        job_note=job_note,
    )


def _living_state(run_directory: Path, said: str | None, job_state: str | None) -> str | None:
    """Return the state the run last gave itself, "killed" where it said running and nothing runs any more.

    A job that SLURM calls RUNNING is believed: locks may not be shared between hosts.
    """
    if said == "running" and job_state != "RUNNING" and holder(run_directory) is None:
        return "killed"
    return said


def describe(status: RunStatus) -> str:
    """Return ``status`` as lines for a person."""
    rows: list[tuple[str, str | None]] = [("run", status.run_directory), ("state", _state_line(status))]
    if status.step is not None:
        total = f" of {status.total_steps}" if status.total_steps else ""
        left = f", {format_duration(status.remaining_seconds)} left" if status.remaining_seconds is not None else ""
        rows.append(("step", f"{status.step}{total}{left}"))
    rows.append(("loss", f"{status.loss:.4f}" if status.loss is not None else None))
    if status.best_validation_loss is not None:
        rows.append(("validation", f"{status.best_validation_loss:.4f} at its best, step {status.best_step}"))
    rows.append(("tokens/s", format_count(status.tokens_per_second) if status.tokens_per_second is not None else None))
    rows.append(("goodput", split_text(status.goodput["fractions"]) if status.goodput is not None else None))
    if status.checkpoints:
        count = f", {len(status.checkpoints)} kept" if len(status.checkpoints) > 1 else ""
        rows.append(("checkpoint", f"step {status.checkpoints[-1]}{count}"))
    else:
        rows.append(("checkpoint", "none yet"))
    rows.append(("restarts", str(status.restarts) if status.restarts is not None else None))
    if status.job_id is not None:
        rows.append(("SLURM job", f"{status.job_id}: {status.job_state or status.job_note}"))
    return "\n".join(f"{name:<11} {value}" for name, value in rows if value is not None)


def _state_line(status: RunStatus) -> str:
    if status.state is None:
        return "not started"
    line = status.state
    if status.exit_code is not None:
        line += f" (exit code {status.exit_code})"
    if status.reason:
        line += f": {status.reason}"
    if status.updated_unix is not None:
        line += f", {format_duration(max(0.0, time.time() - status.updated_unix))} ago"
    return line


def _job_state(job_id: str) -> tuple[str | None, str | None]:
    try:
        state = queue_state(job_id)
    except SlurmCommandError as error:
        return None, f"unknown ({error})"
    return state, None if state else "no longer in the queue"


@dataclass
class _Metrics:
    step: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    step_seconds: float | None = None


def _read_metrics(path: Path) -> _Metrics | None:
    """Return the newest numbers of metrics.jsonl, None where there is no step yet."""
    newest: dict[str, Any] | None = None
    recent: deque[float] = deque(maxlen=_RECENT_STEPS)
    for line in _json_lines(path):
        if line.get("kind") == "evaluation" or _whole(line.get("step")) is None:
            continue
        newest = line
        if (seconds := _number(line.get("step_seconds"))) is not None:
            recent.append(seconds)
    if newest is None:
        return None
    return _Metrics(
        step=_whole(newest.get("step")),
        loss=_number(newest.get("loss")),
        tokens_per_second=_number(newest.get("tokens_per_second")),
        step_seconds=sum(recent) / len(recent) if recent else None,
    )


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file, passing over a torn last line."""
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    content: object = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(content, dict):
                    yield cast("dict[str, Any]", content)
    except OSError:
        return


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if math.isfinite(value) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
