"""`trainer submit`: check a recipe at the size it will run, write the batch script and submit it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def submit(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="launch.slurm.nodes")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="launch.slurm.gpus_per_node")] = None,
    time: Annotated[str | None, typer.Option(help="launch.slurm.time, e.g. 12:00:00")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script; submit and write nothing.")] = False,
) -> None:
    """Submit a run to SLURM. The job checkpoints before its time limit and goes back into the queue."""
    from trainer.launch.slurm import plan, render
    from trainer.launch.submit import submit as submit_job
    from trainer.launch.submit import write_script
    from trainer.preflight.check import prepare

    settings = [*(overrides or []), *_launch_overrides(nodes, gpus_per_node, time)]
    checked = prepare(recipe, settings).recipe  # launch.launcher=slurm: at the size that SLURM is asked for
    run_directory = Path(os.path.abspath(checked.run.directory))
    script = render(
        plan(
            checked,
            command=(sys.executable, "-m", "trainer", "train", os.path.abspath(recipe), *settings),
            preflight=(sys.executable, "-m", "trainer", "check", os.path.abspath(recipe), *settings, "--on-node"),
            python=sys.executable,
            working_directory=Path.cwd(),
            run_directory=run_directory,
        )
    )
    if dry_run:
        typer.echo(script, nl=False)
        return
    path = write_script(run_directory, script, checked.run.group_access)
    job_id = submit_job(path)
    typer.echo(job_id)
    typer.echo(f"submitted {path}; follow it with: trainer status {checked.run.directory}", err=True)


def _launch_overrides(nodes: int | None, gpus_per_node: int | None, time: str | None) -> list[str]:
    """The options as recipe overrides, so that the job resolves the same recipe that was checked here."""
    overrides = ["launch.launcher=slurm"]
    if nodes is not None:
        overrides.append(f"launch.slurm.nodes={nodes}")
    if gpus_per_node is not None:
        overrides.append(f"launch.slurm.gpus_per_node={gpus_per_node}")
    if time is not None:
        # Quoted: to YAML 24:00:00 is a number in base 60, and 30 is not text.
        quoted = time.replace("'", "''")
        overrides.append(f"launch.slurm.time='{quoted}'")
    return overrides
