"""Which part of the time that was allocated to a run went into steps that count, and where the rest went. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer.telemetry.attempt_times import AttemptTimes

PARTS: tuple[tuple[str, str], ...] = (
    ("productive", "productive"),
    ("startup", "start-up"),
    ("restore", "restore"),
    ("redone", "redone"),
    ("evaluation", "evaluation"),
    ("save", "saves"),
    ("other", "other"),
)
"""The parts that add up to the allocated time, and what people read."""


@dataclass(frozen=True, kw_only=True)
class AttemptParts:
    """One attempt's allocated time, divided. Seconds of wall time; the parts add up to ``allocated_seconds``."""

    attempt: int
    world_size: int
    waiting_seconds: float
    """Not allocated: from the end of the attempt before to this one's allocation."""
    allocated_seconds: float
    """From the start of its allocation, or the end of the attempt before in the same one, to its end."""
    productive_seconds: float
    """In steps that count in the end, each once."""
    startup_seconds: float
    """Before the first step, less restoring and evaluations: launcher, imports, rendezvous, building."""
    restore_seconds: float
    redone_seconds: float
    """In steps that were lost: after the checkpoint that a later attempt, or a rewind, went on from."""
    evaluation_seconds: float
    save_seconds: float
    """That training stood still for saves."""
    other_seconds: float
    """The rest: between steps, ending, and a hang until somebody noticed."""
    counted_steps: int
    lost_steps: int


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """A run's time, its attempts together. Seconds of wall time; fractions are of rank-seconds."""

    fraction: float
    """productive / allocated; attempts weigh as much as they have ranks."""
    restarts: int
    steps: int
    """That count."""
    lost_steps: int
    allocated_seconds: float
    waiting_seconds: float
    """Between attempts, not allocated."""
    productive_seconds: float
    startup_seconds: float
    restore_seconds: float
    redone_seconds: float
    evaluation_seconds: float
    save_seconds: float
    other_seconds: float
    rank_hours: float
    fractions: dict[str, float]
    """Of rank-seconds, by the names of :data:`PARTS`; they add up to 1."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready fields."""
        return asdict(self)


def divide(attempts: Sequence[AttemptTimes]) -> list[AttemptParts]:
    """Return where the time of each attempt went; ``attempts`` are all of a run, in order."""
    parts: list[AttemptParts] = []
    end = 0.0
    for number, times in enumerate(attempts):
        begun = [later.base_step for later in attempts[number + 1 :] if later.resumed_step is not None]
        kept_step = min(begun, default=times.last_step)
        since = min(times.allocated_since_unix or times.started_unix, times.started_unix)
        begin = max(since, end)
        waiting = max(0.0, since - end) if number else 0.0
        parts.append(_divide_one(times, begin, max(begin, times.end_unix), waiting, kept_step))
        end = max(begin, times.end_unix)
    return parts


def _divide_one(times: AttemptTimes, begin: float, end: float, waiting: float, kept_step: int) -> AttemptParts:
    left = end - begin

    def take(seconds: float) -> float:
        # Clocks of two hosts, or a damaged file, must not make the parts more than the whole.
        nonlocal left
        taken = min(max(0.0, seconds), left)
        left -= taken
        return taken

    kept_step = max(times.base_step, min(kept_step, times.last_step))
    counted = times.seconds_through(kept_step)
    productive = take(counted)
    redone = take(times.step_seconds - counted + times.rewound_seconds)
    restore = take(times.restore_seconds + times.rewind_restore_seconds)
    evaluation = take(times.evaluation_seconds)
    save = take(times.save_seconds)
    before = (end if times.first_step_unix is None else times.first_step_unix) - begin
    first_evaluation = evaluation if times.first_step_unix is None else times.first_evaluation_seconds
    startup = take(before - times.restore_seconds - first_evaluation)
    return AttemptParts(
        attempt=times.attempt,
        world_size=max(1, times.world_size),
        waiting_seconds=waiting,
        allocated_seconds=end - begin,
        productive_seconds=productive,
        startup_seconds=startup,
        restore_seconds=restore,
        redone_seconds=redone,
        evaluation_seconds=evaluation,
        save_seconds=save,
        other_seconds=left,
        counted_steps=kept_step - times.base_step,
        lost_steps=times.last_step - kept_step + times.rewound_steps,
    )


def goodput(attempts: Sequence[AttemptTimes]) -> Goodput | None:
    """Return the goodput of a run, None where nothing is known of its attempts."""
    parts = divide(attempts)
    weights = [part.allocated_seconds * part.world_size for part in parts]
    rank_seconds = sum(weights)
    if rank_seconds <= 0:
        return None
    fractions = {
        name: sum(getattr(part, f"{name}_seconds") * part.world_size for part in parts) / rank_seconds
        for name, _ in PARTS
    }
    wall = {f"{name}_seconds": sum(getattr(part, f"{name}_seconds") for part in parts) for name, _ in PARTS}
    return Goodput(
        fraction=fractions["productive"],
        # The number of the newest start, since times of an earlier one may be missing.
        restarts=max(part.attempt for part in parts) - 1,
        steps=sum(part.counted_steps for part in parts),
        lost_steps=sum(part.lost_steps for part in parts),
        allocated_seconds=sum(part.allocated_seconds for part in parts),
        waiting_seconds=sum(part.waiting_seconds for part in parts),
        rank_hours=rank_seconds / 3600,
        fractions=fractions,
        **wall,
    )


def split_text(fractions: Mapping[str, float]) -> str:
    """Return "93.1% (start-up 3.0%, redone 1.2%, ...)": the parts of 0.05 % and more, largest first."""
    rest = sorted(((fractions[name], words) for name, words in PARTS[1:]), reverse=True)
    shown = [f"{words} {share:.1%}" for share, words in rest if share >= 0.0005]
    return f"{fractions['productive']:.1%}" + (f" ({', '.join(shown)})" if shown else "")
