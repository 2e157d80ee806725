"""From what a user types to a checkpoint directory."""

from __future__ import annotations

from pathlib import Path

from trainer.checkpoint import layout
from trainer.checkpoint.survey import held_steps
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
        newest = layout.newest(run_directory)
        if newest is None:
            rule, fix = "holds no complete checkpoint", "see trainer checkpoint verify"
            raise RefusedError(Problem("RUN_DIR", str(run_directory), rule, fix))
        return newest[1]
    directory = layout.step_directory(run_directory, step)
    if layout.read_manifest(directory) is None:
        if directory.is_dir():
            rule, fix = f"{directory.name} has no readable {layout.MANIFEST_NAME}", "see trainer checkpoint verify"
            raise RefusedError(Problem(argument, step, rule, fix))
        rule = f"there is no such checkpoint (there are: {held_steps(run_directory)})"
        raise RefusedError(Problem(argument, step, rule, "give one of them"))
    return directory
