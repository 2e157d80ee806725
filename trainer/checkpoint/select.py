"""Choose the checkpoint a start continues from; all ranks together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from trainer.checkpoint import layout
from trainer.checkpoint.agreement import Ranks
from trainer.checkpoint.commit import put_back
from trainer.checkpoint.locate import newest_or_refuse
from trainer.checkpoint.verify import damaged_files
from trainer.core.errors import CheckpointError, Problem, RecipeError


def choose(
    run_directory: Path, resume: Literal["auto", "require", "never"], ranks: Ranks, say: Callable[[str], None]
) -> Path | None:
    """Return the newest undamaged checkpoint, None for a fresh start.

    Damaged ones are passed over, aloud. Raises RecipeError where ``resume`` forbids what is found, CheckpointError
    where checkpoints are there but all are damaged: starting over would bury them.
    """
    if ranks.rank == 0:
        put_back(run_directory)
    found, pointer = ranks.from_first((_step_directories(run_directory), _wrong_pointer(run_directory)))
    if resume == "never" and found:
        raise RecipeError(
            Problem(
                "checkpoint.resume",
                "never",
                f"{run_directory} holds {len(found)} checkpoints",
                "use another run.directory, or checkpoint.resume=auto to continue",
            )
        )
    if pointer and found:
        say(f"{pointer}: passed over, the next checkpoint replaces it")
    for name in reversed(found):
        directory = Path(name)
        problems = _damage(directory, ranks)
        if not problems:
            return directory
        if resume == "require":
            rule = f"the newest checkpoint {directory} is damaged: {problems}"
            fix = "restore it, or use checkpoint.resume=auto to continue from one before it"
            raise RecipeError(Problem("checkpoint.resume", "require", rule, fix))
        say(f"passing over damaged checkpoint {directory.name}: {problems}")
    if found:
        raise CheckpointError(f"{run_directory}: all {len(found)} checkpoints are damaged; nothing was changed")
    if resume == "require":
        raise RecipeError(
            Problem(
                "checkpoint.resume", "require", f"{run_directory} holds no checkpoint", "use checkpoint.resume=auto"
            )
        )
    return None


def choose_before(run_directory: Path, step: int, ranks: Ranks, say: Callable[[str], None]) -> Path | None:
    """Return the newest undamaged checkpoint of a step before ``step``, None if there is none. Collective."""
    for name in reversed(ranks.from_first(_step_directories(run_directory))):
        directory = Path(name)
        number = layout.parse_step_name(directory.name)
        if number is None or number >= step:
            continue
        problems = _damage(directory, ranks)
        if not problems:
            return directory
        say(f"passing over damaged checkpoint {directory.name}: {problems}")
    return None


def choose_source(run_directory: Path, ranks: Ranks, say: Callable[[str], None]) -> Path:
    """Return the newest checkpoint of the run that ``model.path`` names, once all of it was read.

    Raises RefusedError or CheckpointError if it is damaged, or if there is none.
    """
    newest = ranks.from_first(newest_or_refuse(run_directory, "model.path"))
    if newest is None:
        raise CheckpointError(f"model.path = '{run_directory}' is a run directory without a complete checkpoint")
    problems = _damage(newest, ranks)
    if problems:
        raise CheckpointError(f"model.path = '{run_directory}': {newest.name}, the newest, is damaged: {problems}")
    say(f"weights of {run_directory}, step {layout.parse_step_name(newest.name)}")
    return newest


def _damage(directory: Path, ranks: Ranks) -> str:
    """Return what is wrong with a checkpoint, empty if nothing is. Ranks share the hashing: every nth file each."""
    found_by_rank = ranks.gather(damaged_files(directory, ranks.rank, ranks.world_size))
    return "; ".join(sorted({problem for found_here in found_by_rank for problem in found_here}))


def _step_directories(run_directory: Path) -> list[str]:
    """Return the directories that have the name of a step, oldest first; their manifest may be missing or damaged.

    A directory gets this name together with its manifest, so one without was damaged since.
    """
    directory = layout.checkpoints_directory(run_directory)
    paths = list(directory.iterdir()) if directory.is_dir() else []
    found = [(step, path) for path in paths if (step := layout.parse_step_name(path.name)) is not None]
    return [str(path) for _, path in sorted(found) if path.is_dir() and not path.is_symlink()]


def _wrong_pointer(run_directory: Path) -> str | None:
    """Return what is wrong with ``latest``, None if it names a checkpoint: that of before a kill may be named."""
    path = layout.pointer_path(run_directory)
    try:
        name = path.read_bytes()[:100].decode(errors="replace").strip()
    except OSError as error:
        return f"{path}: {error.strerror}"
    if layout.parse_step_name(name) is None or not (path.parent / name).is_dir():
        return f"{path} names no checkpoint ({name!r})"
    return None
