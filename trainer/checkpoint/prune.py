"""Delete checkpoints that need not be kept, by the rules a run has, or by others."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint import layout
from trainer.checkpoint.retention import to_delete
from trainer.checkpoint.survey import Held, recipe_setting, survey
from trainer.core.durable import fsync_directory
from trainer.core.errors import Problem, RefusedError

_KEEP_LAST = 3
"""The recipe's default, for checkpoints that don't tell their recipe."""


@dataclass(frozen=True)
class Pruning:
    """What goes and what stays."""

    keep_last: int
    keep_every: int | None
    delete: tuple[Held, ...]
    keep: tuple[int, ...]
    damaged: tuple[tuple[int, str], ...]
    """(step, what is wrong): not counted as kept, and not deleted."""


def plan_prune(
    run_directory: Path, keep_last: int | None, keep_every: int | None, damage: Callable[[Path], list[str]]
) -> Pruning:
    """Return what to delete; numbers that are not given are those of the newest checkpoint's recipe.

    ``damage`` reads a checkpoint and says what is wrong. Only those that the rules keep are read: one that is damaged
    is not counted, and the next older one is kept instead. Raises RefusedError for bad numbers.
    """
    given = {"--keep-last": keep_last, "--keep-every": keep_every}
    wrong = [Problem(key, value, "must be 1 or more", "raise it") for key, value in given.items()
             if value is not None and value < 1]  # fmt: skip
    if wrong:
        raise RefusedError(wrong)
    held = {found.step: found for found in survey(run_directory).checkpoints}
    damaged = {step: found.problems[0] for step, found in held.items() if found.problems}
    recipe = _newest_manifest(held)
    last = keep_last or _number(recipe_setting(recipe, "checkpoint", "keep_last")) or _KEEP_LAST
    every = keep_every or _number(recipe_setting(recipe, "checkpoint", "keep_every_steps"))
    read: set[int] = set()
    while True:
        sound = [step for step, found in held.items() if found.complete and step not in damaged]
        doomed = to_delete(sound, last, every, [step for step in sound if held[step].best])
        unread = [step for step in reversed(sound) if step not in doomed and step not in read]
        if not unread:
            break
        read.add(unread[0])
        if problems := damage(held[unread[0]].directory):
            damaged[unread[0]] = problems[0]
    kept = [step for step in held if step not in damaged and step not in doomed]
    return Pruning(last, every, tuple(held[step] for step in doomed), tuple(kept), tuple(sorted(damaged.items())))


def delete(run_directory: Path, step: int) -> None:
    """Delete a checkpoint. Raises OSError."""
    aside = layout.temporary_directory(run_directory, step, "deleted")
    # Renamed first: half a deleted checkpoint must not look like one.
    directory = layout.step_directory(run_directory, step)
    directory.rename(aside)
    fsync_directory(directory.parent)
    shutil.rmtree(aside)


def _newest_manifest(held: dict[int, Held]) -> dict[str, Any]:
    complete = [found.directory for _, found in sorted(held.items()) if found.complete]
    return (layout.read_manifest(complete[-1]) or {}) if complete else {}


def _number(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None
