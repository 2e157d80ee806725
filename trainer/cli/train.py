"""``trainer train RECIPE``: join the ranks a launcher has started, or start them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.resilience.signals import StopFlag

if TYPE_CHECKING:
    from trainer.config.run import Recipe
    from trainer.core.environ import RankEnvironment


def train(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML).", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)] = None,
) -> None:
    """Train a recipe; continue where its newest checkpoint is."""
    from trainer.core import environ

    environment = environ.detect(os.environ)
    stop = context.find_object(StopFlag)
    if environment is None:
        if stop is not None:
            stop.pass_on()
        raise typer.Exit(_launch(recipe, overrides or []))
    environ.die_with_parent(os.environ)
    if environment.needs_discovery:
        from trainer.launch.mpirun import discover

        environment = discover(environment)
    if environment.world_size > environment.local_world_size:
        from trainer.launch.address import choose_interface, reachable

        environment = reachable(environment)
        choose_interface(environment, os.environ)
    environ.export(environment, os.environ)

    from trainer.core.errors import TrainerError
    from trainer.launch.slurm_commands import job_end_unix
    from trainer.preflight.check import prepare
    from trainer.training.starting import nothing_to_do

    try:
        prepared = prepare(recipe, overrides or [], environment.world_size)
        words = nothing_to_do(prepared.recipe, prepared.derived.total_steps)
    except TrainerError as error:
        if environment.rank != 0:  # every rank refuses the same recipe; one of them says so
            raise typer.Exit(error.exit_code) from error
        raise
    if words is not None:  # every rank finds the same: none waits for another
        if environment.rank == 0:
            print(words)
        return
    _supervise(prepared.recipe, environment)
    from trainer.training.rank import end_process, run_rank

    end_process(run_rank(prepared.recipe, prepared.derived, prepared.deepspeed, environment, stop, job_end_unix))


def _supervise(recipe: Recipe, environment: RankEnvironment) -> None:
    """Go on as a child of this process, which watches over it from now on."""
    import socket

    from trainer.core.failure_file import launch_name
    from trainer.launch.failure import hosts_of_ranks
    from trainer.launch.supervisor import Watched, become_rank

    settings = recipe.resilience.watchdog
    if not settings.enabled or sys.platform != "linux":
        return
    become_rank(
        Watched(
            ranks=environment,
            run_directory=Path(recipe.run.directory),
            group_access=recipe.run.group_access,
            settings=settings,
            launch=launch_name(environment, os.environ),
            host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            hosts=hosts_of_ranks(environment, os.environ),
        )
    )


def _launch(recipe: Path, overrides: list[str]) -> int:
    """Refuse a bad recipe before anything starts, then start local ranks and wait for them."""
    from trainer.config.hostfile import hosts_of
    from trainer.core.private import keep_private
    from trainer.core.run_lock import refuse_if_held
    from trainer.launch.local import run_local
    from trainer.launch.ssh import run_hosts
    from trainer.launch.stale_stop import is_started_again, withdraw_stale_stop
    from trainer.preflight.check import prepare
    from trainer.training.starting import nothing_to_do

    prepared = prepare(recipe, overrides, None)
    directory = Path(prepared.recipe.run.directory)
    refuse_if_held(directory)
    if (words := nothing_to_do(prepared.recipe, prepared.derived.total_steps)) is not None:
        print(words)
        return 0
    keep_private(prepared.recipe.run.group_access)
    if not is_started_again(os.environ):
        withdraw_stale_stop(directory, print)
    launch, processes = prepared.recipe.launch, prepared.derived.world_size
    print(f"{prepared.recipe.run.name}: starting {processes} rank{'s' if processes > 1 else ''}", flush=True)
    command = [sys.executable, "-m", "trainer", "train", str(recipe), *overrides]
    started = time.time()
    code = run_hosts(hosts_of(launch), command) if launch.launcher == "ssh" else run_local(command, processes)
    note_silent_end(directory, code, started)
    return code


def note_silent_end(directory: Path, code: int, started_unix: float) -> None:
    """Say in status.json how a run ended whose rank 0 could not (SIGKILL, crash, the error of another rank)."""
    from trainer.core.errors import EXIT_OK, EXIT_REFUSED, EXIT_REQUEUE
    from trainer.core.status_file import read_status, write_status

    fields = read_status(directory) or {}
    running, ours = fields.get("state") == "running", fields.get("updated_unix", 0) >= started_unix
    # A start that is refused writes nothing: then the status is that of the run before.
    silent = running and ours if code == EXIT_REFUSED else running or not ours
    if code not in (EXIT_OK, EXIT_REQUEUE) and silent and directory.is_dir():
        reason = _cause(directory, started_unix) or (
            f"the ranks ended with exit code {code} without a word; see {directory}/logs"
        )
        write_status(directory, {**fields, "state": "failed", "exit_code": code, "reason": reason})


def _cause(directory: Path, started_unix: float) -> str | None:
    """Return what ended the launch that has just ended, as its supervisors saw it; None where they saw nothing."""
    from trainer.core.failure_file import read_failure
    from trainer.launch.failure import newest_launch, summarise_launch

    launch = newest_launch(directory, started_unix)
    if launch is None:
        return None
    failure = read_failure(directory, launch) or summarise_launch(directory, launch)
    return str(failure["cause"]) if failure is not None else None
