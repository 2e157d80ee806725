"""From what a user types to a checkpoint directory."""

from __future__ import annotations

from pathlib import Path

from trainer.checkpoint import layout
from trainer.checkpoint.survey import every_step_directory, held_steps
from trainer.core.errors import Problem, RefusedError


def locate(text: str, argument: str) -> Path:
    """Return the directory that ``step-00000050``'s path, RUN_DIR or RUN_DIR@STEP names. Raises RefusedError."""
    path = Path(text)
    if layout.parse_step_name(path.name) is not None and path.is_dir():
        return path
    name, at, step = text.rpartition("@")
    if at and not path.exists():
        if not step.isascii() or not step.isdecimal():
            raise RefusedError(Problem(argument, text, "is not RUN_DIR@STEP", "write for example runs/tiny@50"))
        return checkpoint_of(Path(name), int(step), argument)
    return checkpoint_of(path, None, argument)


def checkpoint_of(run_directory: Path, step: int | None, argument: str = "--step") -> Path:
    """Return the checkpoint of ``step``, or the newest complete one. Raises RefusedError if there is none."""
    if not layout.step_directories(run_directory):
        rule, fix = "holds no checkpoint", "give the run.directory of a recipe"
        raise RefusedError(Problem("RUN_DIR", str(run_directory), rule, fix))
    if step is None:
        option = "--step " if argument == "--step" else f"{run_directory}@"
        newest = newest_or_refuse(run_directory, "RUN_DIR", option)
        if newest is None:
            rule, fix = "holds no complete checkpoint", "see trainer checkpoint verify"
            raise RefusedError(Problem("RUN_DIR", str(run_directory), rule, fix))
        return newest
    directory = layout.step_directory(run_directory, step)
    if layout.read_manifest(directory) is None:
        if directory.is_dir():
            rule, fix = f"{directory.name} has no readable {layout.MANIFEST_NAME}", "see trainer checkpoint verify"
            raise RefusedError(Problem(argument, step, rule, fix))
        rule = f"there is no such checkpoint (there are: {held_steps(run_directory)})"
        raise RefusedError(Problem(argument, step, rule, "give one of them"))
    return directory


def newest_or_refuse(run_directory: Path, key: str, option: str | None = None) -> Path | None:
    """Return the newest complete checkpoint, None if there is none; contents are not hashed here.

    Raises RefusedError where a newer one is not complete: nobody gets an older one than they think. ``option`` is what
    asks for a step, e.g. "--step ", None where nothing does.
    """
    named = every_step_directory(run_directory)  # first: a job may commit one meanwhile
    newest = layout.newest(run_directory)
    if newest is None or not named or named[-1][0] <= newest[0]:
        return newest[1] if newest else None
    step, directory = named[-1]
    rule = f"step {step}, the newest, is damaged: {'; '.join(layout.find_problems(directory))}"
    moves = f"trainer checkpoint repair moves it aside, so that step {newest[0]} is the newest"
    fix = f"restore it, or give {option}{newest[0]}" if option else f"restore it; {moves}"
    raise RefusedError(Problem(key, str(run_directory), rule, fix))
