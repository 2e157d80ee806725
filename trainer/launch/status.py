"""Where a run or a sweep stands, read from its directory and from SLURM. Reads only, copes with the half-written."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from trainer.checkpoint.layout import step_directories
from trainer.core.errors import RefusedError
from trainer.core.failure_file import read_failure
from trainer.core.json_values import number, text, whole
from trainer.core.run_lock import holder
from trainer.core.status_file import read_status
from trainer.launch.queue import Job, Queue, ask_queue
from trainer.launch.submit import recorded_jobs
from trainer.launch.sweep_file import Sweep, Task, task_of_sweep
from trainer.telemetry.attempt_files import read_attempts
from trainer.telemetry.goodput import goodput

_RECENT_STEPS = 20
"""Steps whose mean time the remaining time is estimated from."""
_SHOWN_JOBS = 100


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What ended the last attempt that failed (RUN/failure.json)."""

    kind: str | None
    """hang, killed, exception..."""
    cause: str | None
    fix: str | None
    rank: int | None
    host: str | None
    step: int | None
    time_unix: float | None


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
    """Starts of the run after the first, whoever made them."""
    exit_code: int | None
    reason: str | None
    updated_unix: float | None
    loss: float | None
    best_validation_loss: float | None
    best_step: int | None
    tokens_per_second: float | None
    remaining_seconds: float | None
    finish_unix: float | None
    """When the last step is expected, while the run runs."""
    goodput_fraction: float | None
    """Time in steps that count, over the time that was allocated to the run."""
    goodput: dict[str, Any] | None
    """Where all of the time went, as in status.json."""
    failure: Failure | None
    job_id: str | None
    """The job that runs, else the one that waits, else the newest."""
    job_state: str | None
    """As squeue says it (PENDING, RUNNING...); None when the queue no longer has the job."""
    job_note: str | None
    """Why ``job_state`` is unknown."""
    jobs: list[Job]
    """All recorded jobs that SLURM still knows, oldest first."""

    def to_json(self) -> str:
        """Return one JSON object."""
        return json.dumps(asdict(self), indent=2)


@dataclass(frozen=True, kw_only=True)
class SweepStatus:
    """Where the runs of a sweep stand."""

    sweep_directory: str
    tasks: list[tuple[Task, RunStatus]]
    job_note: str | None

    def to_json(self) -> str:
        """Return one JSON object."""
        tasks = [{"task": task.number, "values": task.values, **asdict(status)} for task, status in self.tasks]
        return json.dumps({"sweep_directory": self.sweep_directory, "tasks": tasks}, indent=2)


def collect(run_directory: Path) -> RunStatus:
    """Return where the run in ``run_directory`` stands. Raises RefusedError where there is no run."""
    if not run_directory.is_dir() and task_of_sweep(run_directory.absolute()) is None:
        raise RefusedError(f"{run_directory} is not a directory → give the run.directory of a recipe")
    ids = recorded_jobs(run_directory.absolute())[-_SHOWN_JOBS:]
    status = _collect(run_directory, ids, ask_queue(ids) if ids else Queue())
    if status is None:
        raise RefusedError(f"{run_directory} holds no run: no status.json, metrics.jsonl, checkpoint or SLURM job")
    return status


def collect_sweep(directory: Path, sweep: Sweep) -> SweepStatus:
    """Return where the runs of the sweep in ``directory`` stand."""
    arrays = recorded_jobs(directory)[-_SHOWN_JOBS:]
    queue = ask_queue(arrays) if arrays else Queue()
    tasks: list[tuple[Task, RunStatus]] = []
    for task in sweep.tasks:
        ids = [f"{array}_{task.number}" for array in arrays]
        status = _collect(directory / task.name, ids, queue)
        if status is not None:
            tasks.append((task, status))
    return SweepStatus(sweep_directory=str(directory), tasks=tasks, job_note=queue.note)


def _collect(run_directory: Path, ids: list[str], queue: Queue) -> RunStatus | None:
    said = read_status(run_directory)
    metrics = _read_metrics(run_directory / "metrics.jsonl")
    checkpoints = [step for step, _ in step_directories(run_directory)]
    if said is None and not ids and metrics is None and not checkpoints:
        return None
    fields, metrics = said or {}, metrics or _Metrics()
    steps = [step for step in (whole(fields.get("step")), metrics.step) if step is not None]
    step, total = max(steps, default=None), whole(fields.get("total_steps"))
    jobs = queue.of(ids)
    current = _current(jobs)
    state = _living_state(run_directory, text(fields.get("state")), current.state if current else None)
    remaining = None
    if fields.get("state") == "running" and step is not None and total is not None and metrics.step_seconds is not None:
        remaining = max(0, total - step) * metrics.step_seconds
    spent = goodput(read_attempts(run_directory))
    note = None
    if ids and current is None:
        note = f"unknown ({queue.note})" if queue.note else "no longer in the queue"
    return RunStatus(
        run_directory=str(run_directory),
        state=state,
        step=step,
        total_steps=total,
        checkpoints=checkpoints,
        restarts=whole(fields.get("restarts")),
        exit_code=whole(fields.get("exit_code")),
        reason=text(fields.get("reason")),
        updated_unix=number(fields.get("updated_unix")),
        loss=metrics.loss,
        best_validation_loss=number(fields.get("best_validation_loss")),
        best_step=whole(fields.get("best_step")),
        tokens_per_second=metrics.tokens_per_second,
        remaining_seconds=remaining,
        finish_unix=time.time() + remaining if remaining is not None and state == "running" else None,
        goodput_fraction=spent.fraction if spent else None,
        goodput=spent.to_json() if spent else None,
        failure=_read_failure(run_directory),
        job_id=current.id if current else (ids[-1] if ids else None),
        job_state=current.state if current else None,
        job_note=note,
        jobs=jobs,
    )


def _current(jobs: list[Job]) -> Job | None:
    """Return the job that runs, else the first that waits, else the newest."""
    running = [job for job in jobs if not job.ended and not job.waits]
    waiting = [job for job in jobs if job.waits]
    return next(iter([*running, *waiting, *reversed(jobs)]), None)


def _living_state(run_directory: Path, said: str | None, job_state: str | None) -> str | None:
    """Return the state the run last gave itself, "killed" where it said running and nothing runs any more.

    A job that SLURM calls RUNNING is believed: locks may not be shared between hosts.
    """
    if said == "running" and job_state != "RUNNING" and holder(run_directory) is None:
        return "killed"
    return said


def _read_failure(run_directory: Path) -> Failure | None:
    """Return what RUN/failure.json says, None where it is missing or says nothing."""
    fields = read_failure(run_directory) or {}
    kind, cause = text(fields.get("class")), text(fields.get("cause"))
    if kind is None and cause is None:
        return None
    return Failure(
        kind=kind,
        cause=cause,
        fix=text(fields.get("fix")),
        rank=whole(fields.get("rank")),
        host=text(fields.get("host")),
        step=whole(fields.get("step")),
        time_unix=number(fields.get("time_unix")),
    )


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
        if line.get("kind") == "evaluation" or whole(line.get("step")) is None:
            continue
        newest = line
        if (seconds := number(line.get("step_seconds"))) is not None:
            recent.append(seconds)
    if newest is None:
        return None
    return _Metrics(
        step=whole(newest.get("step")),
        loss=number(newest.get("loss")),
        tokens_per_second=number(newest.get("tokens_per_second")),
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
