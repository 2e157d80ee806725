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

    Raises RefusedError where RUN/DONE says that it finished but no checkpoint is left, and DoNotRestartError where
    RUN/stop exists and something is left to do.
    """
    directory = Path(recipe.run.directory)
    newest = layout.newest(directory)
    if newest is None:
        _refuse_lost(directory)
    words = _finished(recipe, total_steps, newest) if newest is not None else None
    if words is None and stop_file_problem(directory) == "":
        raise DoNotRestartError(f"{stop_path(directory)} exists: remove it to continue the run")
    return words


def _refuse_lost(directory: Path) -> None:
    """Raise RefusedError if a run has finished here: it would be trained all over again."""
    done = read_done(directory)
    if done is not None:
        rule = f"says that the run finished at step {done.step}, but there is no checkpoint any more"
        fix = f"bring {layout.step_name(done.step)} back, or delete DONE to train from the beginning"
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
