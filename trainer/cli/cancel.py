"""`trainer cancel`: end the jobs of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def cancel(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run.directory of a recipe.")],
    now: Annotated[bool, typer.Option("--now", help="Don't wait for a save.")] = False,
    whole_sweep: Annotated[bool, typer.Option("--all", help="Every run of a sweep.")] = False,
) -> None:
    """End the jobs that were submitted for a run. What runs saves first."""
    from trainer.launch.cancel import cancel as cancel_jobs

    if cancel_jobs(run_directory, now=now, whole_sweep=whole_sweep, say=typer.echo).foreign:
        raise typer.Exit(1)
