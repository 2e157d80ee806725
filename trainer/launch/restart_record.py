"""RUN/slurm/restarts.json: how each attempt of the run's SLURM jobs ended, and what was decided then."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

from trainer.core.durable import replace_text
from trainer.launch.submit import made_slurm_directory, slurm_directory

DecisionName = Literal["running", "done", "requeue", "retry", "scheduler", "lost", "stop"]
"""running: not ended yet. done: the run has finished. requeue: saved, goes on. retry: failed, tried again. scheduler:
SLURM or an administrator put the job back. lost: the attempt ended without a word, and SLURM started the job again.
stop: the job stays ended."""
_NAME = "restarts.json"
_VERSION = 1
_COUNTED = ("requeue", "retry", "lost", "stop")
"""A stop: of an earlier job of the chain, which could not go back into the queue, say."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a batch script."""

    job: str
    restart: int
    """How often SLURM had started the job before."""
    nodes: str = ""
    """Host list."""
    started_unix: float
    attempt: int | None = None
    """The run's own number of this start; None: the ranks did not get so far."""
    step: int = 0
    """Newest committed checkpoint when it ended."""
    decision: DecisionName = "running"
    reason: str = ""
    exit_code: int | None = None
    asked_at_limit: bool = False
    """SLURM was asked to start the job again before the ranks had ended."""
    time_unix: float = 0.0
    """When it was decided."""
    script: str = ""
    """File name of what was submitted; the jobs of a chain have the same."""
    given_up_unix: float = 0.0
    """When it was decided that no other job is to start instead, by the clock that dates files; 0: it was not."""


def read(run_directory: Path) -> list[Attempt]:
    """Return all attempts, oldest first; empty where the file is missing, what is damaged in it is passed over."""
    try:
        content: object = json.loads((slurm_directory(run_directory) / _NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    entries = cast("dict[str, object]", content).get("attempts") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        return []
    found = [_parse(entry) for entry in cast("list[object]", entries)]
    return [attempt for attempt in found if attempt is not None]


_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,), "int": (int,), "bool": (bool,), "float": (int, float), "int | None": (int, type(None)),
    "DecisionName": (str,),
}  # fmt: skip


def _parse(entry: object) -> Attempt | None:
    if not isinstance(entry, dict):
        return None
    given = cast("dict[str, Any]", entry)
    values = {field.name: given[field.name] for field in fields(Attempt) if field.name in given}
    if any(not isinstance(values.get(field.name, field.default), _TYPES[str(field.type)]) for field in fields(Attempt)):
        return None
    return Attempt(**values) if values.get("decision", "running") in get_args(DecisionName) else None


def write(run_directory: Path, attempt: Attempt) -> None:
    """Add ``attempt``, or replace what was noted of the same start. Raises OSError."""
    attempts = read(run_directory)
    same = [number for number, other in enumerate(attempts) if _key(other) == _key(attempt)]
    if same:
        attempts[same[-1]] = attempt
    else:
        attempts.append(attempt)
    directory = made_slurm_directory(run_directory)
    content = {"version": _VERSION, "attempts": [asdict(one) for one in attempts]}
    replace_text(directory / _NAME, json.dumps(content, indent=2) + "\n")


def _key(attempt: Attempt) -> tuple[str, int]:
    return attempt.job, attempt.restart


def find(attempts: Sequence[Attempt], job: str, restart: int) -> Attempt | None:
    """Return what was noted of a start, None if nothing was."""
    return next((one for one in reversed(attempts) if _key(one) == (job, restart)), None)


def restarts_without_progress(attempts: Sequence[Attempt], job: str, restart: int, step: int) -> int:
    """Return how many automatic restarts in a row led to no checkpoint beyond ``step``, before start ``restart`` ends.

    Counted back from the start before, within the job and the chain that it belongs to, and to the last decision that
    ended it: what a person starts begins anew. Restarts that SLURM made (preemption) say nothing of the run and are
    passed over. Starts that could not be recorded count, whatever they were: else a job that can't write would start
    again for ever.
    """
    count = _unrecorded(attempts, job, restart)
    own = find(attempts, job, restart)
    for one in _series(attempts, job, restart, own.script if own else ""):
        if one.decision in _COUNTED:
            if one.step < step:
                break
            count += 1
    return count


def preemptions_without_progress(attempts: Sequence[Attempt], job: str, restart: int, step: int) -> int:
    """Return how often in a row SLURM itself has put the job back since a checkpoint before ``step``."""
    count = 0
    for one in _series(attempts, job, restart):
        if one.decision != "scheduler" or one.step < step:
            break
        count += 1
    return count


def before(attempts: Sequence[Attempt], job: str, restart: int, script: str) -> Attempt | None:
    """Return the start before, of the job or else of its chain; None if there is none."""
    if restart:
        return find(attempts, job, restart - 1)
    return next((one for one in reversed(attempts) if script and one.script == script and one.job != job), None)


def _unrecorded(attempts: Sequence[Attempt], job: str, restart: int) -> int:
    """Return how many starts of the job in a row before ``restart``, itself not recorded, left no record."""
    newest = max((one.restart for one in attempts if one.job == job and one.restart <= restart), default=-1)
    return max(restart - 1 - newest, 0)


def retries(attempts: Sequence[Attempt], job: str, restart: int) -> int:
    """Return how often the job was started again after a failure."""
    return sum(one.decision in ("retry", "lost") for one in _series(attempts, job, restart))


def _series(attempts: Sequence[Attempt], job: str, restart: int, script: str = "") -> list[Attempt]:
    """Return the starts before ``restart`` of ``job``, newest first, as far back as a person began it.

    With those of the other jobs that were submitted by ``script``, where it is given.
    """
    series: list[Attempt] = []
    for one in reversed(attempts):
        own = one.job == job
        if (one.restart >= restart) if own else (not script or one.script != script):
            continue
        if one.decision == "done" or one.given_up_unix or (own and one.decision == "stop"):
            break
        series.append(one)
    return series
