"""`trainer report`: what became of a run, and where its time went."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer


def report(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run.directory of a recipe.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    mtbf_hours: Annotated[
        float | None,
        typer.Option(help="Advise checkpoint.every_steps for one failure of the job in so many hours.", min=0.01),
    ] = None,
) -> None:
    """Show what became of a run: steps, tokens, goodput and where the rest of the time went, every restart."""
    from trainer.core.errors import Problem, RefusedError
    from trainer.telemetry.run_report import collect_report, describe_report, interval_lines

    if mtbf_hours is not None and not math.isfinite(mtbf_hours):
        rule = "must be a finite number: without failures no checkpoint is needed, and none is the best interval"
        raise RefusedError(Problem("--mtbf-hours", mtbf_hours, rule, "give the hours between two failures of the job"))
    found = collect_report(run_directory)
    if found.goodput is None and found.state is None:
        raise RefusedError(f"{run_directory} holds no run that has started → give the run.directory of a recipe")
    lines = [found.to_json()] if json_output else describe_report(found)
    if mtbf_hours is not None and not json_output:
        lines += interval_lines(found.costs, mtbf_hours)
    typer.echo("\n".join(lines))
