"""What one attempt of a run spent its time on: the content of RUN/attempts/NNNN/timing.json."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, cast

VERSION = 1
_MOST_MARKS = 200
"""A file of a few kilobytes, however long the attempt: every second mark goes when there are more."""


@dataclass
class AttemptTimes:
    """Times of one attempt, seen by rank 0. Durations in seconds, ``_unix`` in seconds since 1970."""

    attempt: int
    """Number of the start, counted from 1."""
    world_size: int = 1
    nodes: int = 1
    launch: str = ""
    """Name of the launch, as in failure.json; empty in files of older trainers."""
    slurm_job_id: str = ""
    slurm_restarts: int = 0
    allocated_since_unix: float = 0.0
    """When its processors were handed over: start of the SLURM job or, without one, of the process."""
    started_unix: float = 0.0
    """When rank 0's process started."""
    resumed_step: int | None = None
    """0: a fresh start; None: it ended before that was known."""
    restore_seconds: float = 0.0
    """Choosing, verifying and loading the checkpoint; 0 for a fresh start."""
    first_step_unix: float | None = None
    """When the first step began."""
    first_evaluation_seconds: float = 0.0
    """The part of ``evaluation_seconds`` before the first step."""
    base_step: int = 0
    """The lowest step it went on from: ``resumed_step``, or the target of a rewind."""
    last_step: int = 0
    last_step_unix: float | None = None
    step_seconds: float = 0.0
    """In the steps from ``base_step`` to ``last_step``, each once."""
    marks: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    """(step, ``step_seconds`` through it), every so many steps: what a later attempt redoes is read off them."""
    mark_every: int = 1
    """Least steps between two marks."""
    rewound_steps: int = 0
    """Done and given up by the attempt itself, which went back to a checkpoint."""
    rewound_seconds: float = 0.0
    rewind_restore_seconds: float = 0.0
    """Loading the checkpoints it went back to."""
    evaluation_seconds: float = 0.0
    saves: int = 0
    save_seconds: float = 0.0
    """That training stood still for saves."""
    durable_seconds: float = 0.0
    """From the begin of each save until it was durable, all saves together."""
    updated_unix: float = 0.0
    """Rank 0 lived then."""
    ended_unix: float | None = None
    outcome: str | None = None
    """finished, stopped or failed; None while it runs, and where it was killed."""
    reason: str | None = None

    @property
    def end_unix(self) -> float:
        """When it ended, or the last sign of life."""
        return max(self.ended_unix or self.updated_unix, self.last_step_unix or 0.0, self.started_unix)

    def add_step(self, step: int, seconds: float, ended_unix: float, count: int = 1) -> None:
        """Count the steps up to ``step``, ``count`` of them, which took ``seconds`` together.

        A step that was done before means that the attempt has gone back to a checkpoint.
        """
        if self.first_step_unix is None:
            self.first_step_unix = ended_unix - seconds
            self.first_evaluation_seconds = self.evaluation_seconds
        if step - count < self.last_step:
            self.go_back(step - count)
        self.last_step, self.last_step_unix = step, ended_unix
        self.step_seconds += seconds
        if step - (self.marks[-1][0] if self.marks else self.base_step) >= self.mark_every:
            self.marks.append((step, self.step_seconds))
        if len(self.marks) > _MOST_MARKS:
            self.marks, self.mark_every = self.marks[1::2], 2 * self.mark_every

    def seconds_through(self, step: int) -> float:
        """Return the seconds in steps up to ``step``; between two marks steps count as equally long."""
        if step <= self.base_step:
            return 0.0
        before_step, before = self.base_step, 0.0
        for at, seconds in [*self.marks, (self.last_step, self.step_seconds)]:
            if step < at:
                return before + (step - before_step) / (at - before_step) * (seconds - before)
            before_step, before = at, seconds
        return self.step_seconds

    def go_back(self, to_step: int) -> None:
        """Give up the steps after ``to_step``."""
        kept = self.seconds_through(to_step)
        self.rewound_steps += self.last_step - max(to_step, self.base_step)
        self.rewound_seconds += self.step_seconds - kept
        self.step_seconds = kept
        self.base_step, self.last_step = min(self.base_step, to_step), to_step
        self.marks = [mark for mark in self.marks if mark[0] <= to_step]

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready fields."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, values: object) -> AttemptTimes | None:
        """Return the times that a file holds, None where it holds none. Nothing in it is trusted."""
        if not isinstance(values, dict):
            return None
        given = cast("dict[str, object]", values)
        if given.get("version") != VERSION or not _sound(given.get("attempt"), "int"):
            return None
        kept = {f.name: given[f.name] for f in fields(cls) if f.name in given and _sound(given[f.name], str(f.type))}
        times = cls(**cast("dict[str, Any]", kept))
        times.base_step = min(times.base_step, times.last_step)
        times.marks = _rising(given.get("marks"), times)
        return times


def _sound(value: object, kind: str) -> bool:
    if value is None:
        return "None" in kind
    if kind.startswith("str"):
        return isinstance(value, str)
    if kind.startswith("int"):
        return type(value) is int and value >= 0
    return kind.startswith("float") and type(value) in (int, float) and 0 <= cast("float", value) < math.inf


def _rising(given: object, times: AttemptTimes) -> list[tuple[int, float]]:
    """Return the marks of a file up to the first that can't be true."""
    marks: list[tuple[int, float]] = []
    before = (times.base_step, 0.0)
    for mark in cast("list[object]", given) if isinstance(given, list) else []:
        pair = cast("list[object]", mark) if isinstance(mark, list) else []
        if len(pair) != 2 or not _sound(pair[0], "int") or not _sound(pair[1], "float"):
            break
        step, seconds = cast("int", pair[0]), float(cast("float", pair[1]))
        if not before[0] < step <= times.last_step or not before[1] <= seconds <= times.step_seconds:
            break
        before = (step, seconds)
        marks.append(before)
    return marks
