"""Read and write RUN/attempts/NNNN/timing.json; what a killed attempt could not write is taken from other files."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from trainer.core.durable import replace_text
from trainer.core.failure_file import read_failure
from trainer.core.status_file import read_status
from trainer.telemetry.attempt_times import AttemptTimes

_TAIL_BYTES = 8 * 2**20
"""Of metrics.jsonl: the lines of a few seconds, even of steps of a millisecond."""

_MOST_SILENT_SECONDS = 1800.0
"""Between the last sign of life of a start and the word of others that it has ended."""


def timing_path(run_directory: Path, attempt: int) -> Path:
    """Return RUN/attempts/NNNN/timing.json."""
    return run_directory / "attempts" / f"{attempt:04d}" / "timing.json"


def write_times(run_directory: Path, times: AttemptTimes) -> None:
    """Replace the attempt's file atomically. Nothing hangs on it, so OSError is passed over."""
    with contextlib.suppress(OSError):
        replace_text(timing_path(run_directory, times.attempt), json.dumps(times.to_json()) + "\n")


def read_attempts(run_directory: Path) -> list[AttemptTimes]:
    """Return the times of all attempts that left some, in order; damaged files are passed over.

    One that could not say how it ended is completed from metrics.jsonl and by what others say of its end: its own file
    is a few seconds old.
    """
    found = [_read(path) for path in run_directory.glob("attempts/[0-9]*/timing.json")]
    attempts = sorted((times for times in found if times is not None), key=lambda times: times.attempt)
    # Only a start that got as far as knowing its step has cut metrics.jsonl: the lines at its end are that one's.
    begun = [index for index, times in enumerate(attempts) if times.resumed_step is not None]
    if begun and attempts[begun[-1]].outcome is None:
        after = attempts[begun[-1] + 1 :]
        _complete(run_directory, attempts[begun[-1]], after[0].started_unix if after else math.inf)
    return attempts


def close_books(run_directory: Path) -> list[AttemptTimes]:
    """Write down what is known of the attempts before, for a new start is about to cut metrics.jsonl; return them."""
    attempts = read_attempts(run_directory)
    for times in attempts[::-1]:
        if times.resumed_step is not None:
            write_times(run_directory, times)
            break
    return attempts


def _read(path: Path) -> AttemptTimes | None:
    return AttemptTimes.from_json(_json_object(path))


def _json_object(path: Path) -> dict[str, Any] | None:
    try:
        content: object = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", content) if isinstance(content, dict) else None


def _complete(run_directory: Path, times: AttemptTimes, next_unix: float) -> None:
    """Add what happened after the attempt last wrote its times, and how it ended as far as others say it."""
    written_unix, lives_until = times.updated_unix, times.updated_unix
    for line in newest_lines(run_directory / "metrics.jsonl"):
        step, at = line.get("step"), line.get("time_unix")
        if not isinstance(step, int) or not isinstance(at, float) or at < times.started_unix:
            continue
        if line.get("kind") == "evaluation":
            seconds = line.get("seconds")
            if at > written_unix and isinstance(seconds, float):
                times.evaluation_seconds += seconds
        elif step > times.last_step and isinstance(seconds := line.get("step_seconds"), float):
            # One line stands for every step since the line before (telemetry.log_every_steps).
            count = step - times.last_step
            times.add_step(step, seconds * count, at, count)
        lives_until = max(lives_until, at)
    times.updated_unix = lives_until
    for end in (_said_by_failure_file(run_directory, times), _said_by_status(run_directory, times)):
        if end is not None and written_unix <= end[0] <= next_unix:
            # What is said long after may have been said by the next allocation, whose wait is no time of this one.
            silent = end[0] - lives_until > _MOST_SILENT_SECONDS
            times.ended_unix = lives_until if silent else end[0]
            times.outcome, times.reason = "failed", end[1]
            return


def _said_by_failure_file(run_directory: Path, times: AttemptTimes) -> tuple[float, str] | None:
    """Return when and why the newest failed attempt ended, as those said who watched the ranks."""
    failure = read_failure(run_directory) or {}
    launch = str(failure.get("launch", ""))
    if times.launch and launch != times.launch:
        return None  # by the check of the nodes that the job got next, or a start that ended before it had a number
    at, cause = failure.get("time_unix"), failure.get("cause")
    return (at, cause) if isinstance(at, float) and isinstance(cause, str) else None


def _said_by_status(run_directory: Path, times: AttemptTimes) -> tuple[float, str] | None:
    """Return what the launcher wrote where rank 0 could not."""
    status = read_status(run_directory) or {}
    at, reason = status.get("updated_unix"), status.get("reason")
    said = status.get("state") == "failed" and status.get("attempt") == times.attempt
    return (at, reason) if said and isinstance(at, float) and isinstance(reason, str) else None


def newest_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects at the end of a file, passing over torn lines."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            if size > _TAIL_BYTES:
                file.readline()
            lines = file.readlines()
    except OSError:
        return
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            content: object = json.loads(line)
            if isinstance(content, dict):
                yield cast("dict[str, Any]", content)
