"""`trainer status`: where a run or a sweep stands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def status(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run.directory of a recipe.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show where a run stands: step, loss, time left, checkpoints, restarts, last error, SLURM jobs."""
    from trainer.launch.status import collect, collect_sweep
    from trainer.launch.status_text import describe, describe_sweep
    from trainer.launch.sweep_file import read_sweep

    sweep = read_sweep(run_directory)
    if sweep is not None:
        runs = collect_sweep(run_directory, sweep)
        typer.echo(runs.to_json() if json_output else describe_sweep(runs))
        return
    found = collect(run_directory)
    typer.echo(found.to_json() if json_output else describe(found))
