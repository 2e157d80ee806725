"""``trainer train RECIPE``: join the ranks a launcher has started, or start them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from trainer.config.run import Recipe


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML).", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)] = None,
) -> None:
    """Train a recipe; continue where its newest checkpoint is."""
    from trainer.core import environ

    environment = environ.detect(os.environ)
    if environment is None:
        raise typer.Exit(_launch(recipe, overrides or []))
    environ.die_with_parent(os.environ)
    if environment.needs_discovery:
        from trainer.launch.mpirun import discover

        environment = discover(environment)
    elif environment.launcher == "slurm":
        from trainer.launch.address import reachable

        environment = reachable(environment)
    environ.export(environment, os.environ)

    from trainer.core.errors import TrainerError
    from trainer.preflight.check import prepare

    try:
        prepared = prepare(recipe, overrides or [], environment.world_size)
    except TrainerError as error:
        if environment.rank != 0:  # every rank refuses the same recipe; one of them says so
            raise typer.Exit(error.exit_code) from error
        raise
    from trainer.training.rank import end_process, run_rank

    end_process(run_rank(prepared.recipe, prepared.derived, prepared.deepspeed, environment))


def _launch(recipe: Path, overrides: list[str]) -> int:
    """Refuse a bad recipe before anything starts, then start local ranks and wait for them."""
    from trainer.core.private import keep_private
    from trainer.core.run_lock import refuse_if_held
    from trainer.launch.local import run_local
    from trainer.preflight.check import prepare

    prepared = prepare(recipe, overrides, None)
    directory = Path(prepared.recipe.run.directory)
    refuse_if_held(directory)
    if (words := already_finished(prepared.recipe, prepared.derived.total_steps)) is not None:
        print(words)
        return 0
    keep_private(prepared.recipe.run.group_access)
    processes = prepared.recipe.launch.processes
    print(f"{prepared.recipe.run.name}: starting {processes} rank{'s' if processes > 1 else ''}", flush=True)
    command = [sys.executable, "-m", "trainer", "train", str(recipe), *overrides]
    started = time.time()
    code = run_local(command, processes)
    note_silent_end(directory, code, started)
    return code


def already_finished(recipe: Recipe, total_steps: int) -> str | None:
    """Return how the run has ended if there is nothing left to do: its last step reached, or early stopping."""
    from trainer.checkpoint import layout
    from trainer.evaluation.best import BestEvaluation, stopping_reason

    directory = Path(recipe.run.directory)
    newest = layout.newest(directory)
    if newest is None:
        return None
    step, path = newest
    pointed = layout.read_pointer(directory)  # behind a later one that was passed over as damaged
    if pointed is not None and pointed[0] < step:
        step, path = pointed
    where = f"at step {step}, {total_steps} asked for, in {directory}"
    if step >= total_steps:
        return f"already finished: {where}\nraise run.steps to continue it, or use another run.directory"
    train = (layout.read_manifest(path) or {}).get("state", {}).get("train", {})
    best = BestEvaluation.from_json(train.get("best", {}))
    reason = stopping_reason(recipe, best) if best is not None else None
    if reason is None:
        return None
    fix = "raise evaluation.early_stopping.patience to continue it, or use another run.directory"
    return f"already finished: {where}: {reason}\n{fix}"


def note_silent_end(directory: Path, code: int, started_unix: float) -> None:
    """Say in status.json how a run ended whose rank 0 could not (SIGKILL, crash, the error of another rank)."""
    from trainer.core.errors import EXIT_OK, EXIT_REFUSED, EXIT_REQUEUE
    from trainer.core.status_file import read_status, write_status

    fields = read_status(directory) or {}
    running, ours = fields.get("state") == "running", fields.get("updated_unix", 0) >= started_unix
    # A start that is refused writes nothing: then the status is that of the run before.
    silent = running and ours if code == EXIT_REFUSED else running or not ours
    if code not in (EXIT_OK, EXIT_REQUEUE) and silent and directory.is_dir():
        reason = f"the ranks ended with exit code {code} without a word; see {directory}/logs"
        write_status(directory, {**fields, "state": "failed", "exit_code": code, "reason": reason})
