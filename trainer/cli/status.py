"""`trainer status`: where a run stands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def status(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run.directory of a recipe.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show where a run stands: step, loss, speed, last checkpoint, restarts, SLURM job."""
    from trainer.launch.status import collect, describe

    found = collect(run_directory)
    typer.echo(found.to_json() if json_output else describe(found))
