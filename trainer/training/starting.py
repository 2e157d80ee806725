"""Whether a start has anything to do, and may: decided from files alone, so that every rank decides alike."""

from __future__ import annotations

from pathlib import Path

from trainer.checkpoint import layout
from trainer.config.run import Recipe
from trainer.core.control_file import stop_file_problem, stop_path
from trainer.core.done_file import done_path, read_done
from trainer.core.errors import DoNotRestartError, Problem, RefusedError
from trainer.evaluation.best import BestEvaluation, stopping_reason


def nothing_to_do(recipe: Recipe, total_steps: int) -> str | None:
    """Return how the run has ended if there is nothing left to do: its last step reached, or early stopping.

    Raises RefusedError where RUN/DONE names a checkpoint that is gone, and DoNotRestartError where RUN/stop exists and
    something is left to do.
    """
    directory = Path(recipe.run.directory)
    newest = layout.newest(directory)
    _refuse_lost(directory, newest[0] if newest is not None else None)
    words = _finished(recipe, total_steps, newest) if newest is not None else None
    if words is None and stop_file_problem(directory) == "":
        raise DoNotRestartError(f"{stop_path(directory)} exists: remove it to continue the run")
    return words


def _refuse_lost(directory: Path, newest_step: int | None) -> None:
    """Raise RefusedError if the checkpoint that a finished run has left is gone: it would be trained all over again."""
    done = read_done(directory)
    if done is None or (newest_step is not None and newest_step >= done.step):
        return
    found = "there is no checkpoint" if newest_step is None else f"the newest checkpoint is of step {newest_step}"
    rule = f"says that the run finished at step {done.step}, but {found}"
    fix = f"bring {layout.step_name(done.step)} back, or delete DONE to train from what is there"
    raise RefusedError(Problem(str(done_path(directory)), None, rule, fix))


def _finished(recipe: Recipe, total_steps: int, newest: tuple[int, Path]) -> str | None:
    directory = Path(recipe.run.directory)
    step, path = newest
    pointed = layout.read_pointer(directory)  # behind a later one that was passed over as damaged
    if pointed is not None and pointed[0] < step:
        step, path = pointed
    where = f"at step {step}, {total_steps} asked for, in {directory}"
    if step >= total_steps:
        return f"already finished: {where}\nraise run.steps to continue it, or use another run.directory"
    if recipe.evaluation.early_stopping is None:  # manifests of large models are large
        return None
    train = (layout.read_manifest(path) or {}).get("state", {}).get("train", {})
    best = BestEvaluation.from_json(train.get("best", {}))
    reason = stopping_reason(recipe, best) if best is not None else None
    if reason is None:
        return None
    fix = "raise evaluation.early_stopping.patience to continue it, or use another run.directory"
    return f"already finished: {where}: {reason}\n{fix}"
