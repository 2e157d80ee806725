"""`trainer status` for a person: aligned lines, a table of jobs, a table of a sweep's runs."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from trainer.core.units import format_count, format_duration
from trainer.launch.queue import WAITING, Job
from trainer.launch.status import Failure, RunStatus, SweepStatus
from trainer.telemetry.goodput import split_text

_SHOWN_VALUE = 40


def describe(status: RunStatus) -> str:
    """Return ``status`` as lines."""
    rows: list[tuple[str, str | None]] = [("run", status.run_directory), ("state", _state_line(status))]
    rows.append(("step", _step_line(status)))
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
    if status.failure is not None and status.state != "finished":
        rows += _failure_rows(status.failure)
    if status.job_id is not None and status.job_state is None:
        rows.append(("SLURM job", f"{status.job_id}: {status.job_note}"))
    lines = [f"{name:<11} {_plain(value)}" for name, value in rows if value is not None]
    if status.jobs:
        lines += ["", *_job_table(status.jobs)]
    return "\n".join(lines)


def describe_sweep(status: SweepStatus) -> str:
    """Return a line for each run of a sweep."""
    counts: dict[str, int] = {}
    for _, run in status.tasks:
        counts[_short_state(run)] = counts.get(_short_state(run), 0) + 1
    summary = ", ".join(f"{count} {state}" for state, count in counts.items())
    keys = list(status.tasks[0][0].values) if status.tasks else []
    rows = [["task", "run", *keys, "state", "step", "loss", "validation", "job", "restarts"]]
    for task, run in status.tasks:
        step = f"{run.step} of {run.total_steps}" if run.step is not None and run.total_steps else _dash(run.step)
        restarts = _dash(run.restarts)
        numbers = [f"{value:.4f}" if value is not None else "-" for value in (run.loss, run.best_validation_loss)]
        values = [_shortened(json.dumps(value)) for value in task.values.values()]
        job = run.job_state or "-"
        rows.append([str(task.number), task.name, *values, run.state or "not started", step, *numbers, job, restarts])
    note = [f"SLURM: {_plain(status.job_note)}"] if status.job_note else []
    return "\n".join([f"sweep {status.sweep_directory}: {len(status.tasks)} runs, {summary}", "", *_table(rows), *note])


def _short_state(run: RunStatus) -> str:
    if run.job_state in WAITING:
        return "waiting"
    if run.state is None:
        return "not started"
    return run.state


def _step_line(status: RunStatus) -> str | None:
    if status.step is None:
        return None
    line = str(status.step)
    if status.total_steps:
        line += f" of {status.total_steps} ({status.step / status.total_steps:.1%})"
    if status.remaining_seconds is not None:
        soon = status.finish_unix is None or status.remaining_seconds < 60
        at = "" if soon or status.finish_unix is None else f", done about {_clock(status.finish_unix)}"
        line += f", {format_duration(status.remaining_seconds)} left{at}"
    return line


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


def _failure_rows(failure: Failure) -> list[tuple[str, str | None]]:
    text = f"{failure.kind}: {failure.cause}" if failure.kind and failure.cause else failure.cause or failure.kind
    if failure.time_unix is not None:
        text = f"{text} ({format_duration(max(0.0, time.time() - failure.time_unix))} ago)"
    return [("last error", text), ("", f"→ {failure.fix}" if failure.fix else None)]


def _job_table(jobs: Sequence[Job]) -> list[str]:
    rows = [["SLURM job", "state", "why", "since / expected", "time left", "restarts", "nodes"]]
    for job in jobs:
        left = "-"
        if job.state == "RUNNING" and job.end_unix is not None:
            left = format_duration(max(0.0, job.end_unix - time.time()))
        start = _clock(job.start_unix) if job.start_unix is not None else "-"
        why = job.reason or "-" if job.waits or (job.ended and job.state != "CANCELLED") else "-"
        rows.append([job.id, job.state, why, start, left, _dash(job.restarts), job.nodes or "-"])
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows with their columns below each other."""
    plain = [[_plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*plain, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in plain]


def _clock(unix: float) -> str:
    """Return the local time, with the day where it is not today."""
    at = time.localtime(unix)
    today = time.localtime()
    near = (at.tm_year, at.tm_yday) == (today.tm_year, today.tm_yday)
    return time.strftime("%H:%M" if near else "%a %d %b %H:%M", at)


def _dash(number: int | None) -> str:
    return "-" if number is None else str(number)


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_VALUE else text[: _SHOWN_VALUE - 1] + "…"


def _plain(text: str) -> str:
    """Return ``text`` without what a terminal would obey: files of a run are written by many."""
    return "".join(character if character.isprintable() else " " for character in text)
