"""`trainer control`: ask a running trainer to save, to stop, or to log more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def control(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run.directory of a recipe.")],
    action: Annotated[str, typer.Argument(help="save, stop, stop-after, log-level, clear or status.")],
    value: Annotated[str | None, typer.Argument(help="The step of stop-after, the level of log-level.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the run's answer.")] = True,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait at most.")] = 120.0,
) -> None:
    """Ask a running trainer: save (a checkpoint now), stop (save and end), stop-after N (after step N is done),
    log-level debug|info|warning|error, clear (withdraw stop-after), status (what was asked, and what became of it).

    The run looks when a step begins.
    """
    from trainer.core.control_file import ACTIONS, Action, new_command
    from trainer.core.errors import EXIT_FAILURE, Problem, RefusedError
    from trainer.launch.control import ask_run, noted

    if action == "status" and value is None:
        typer.echo(noted(run_directory))
        return
    chosen: Action | None = next((known for known in ACTIONS if known == action), None)
    if chosen is None:
        raise RefusedError(Problem("trainer control", action, f"must be one of {', '.join((*ACTIONS, 'status'))}"))
    step = int(value) if value is not None and value.isascii() and value.isdigit() and len(value) < 16 else None
    command = new_command(chosen, value if step is None else step)
    answer = ask_run(run_directory, command, wait_seconds=timeout if wait else 0.0)
    typer.echo(answer.text)
    if not answer.good:
        raise typer.Exit(EXIT_FAILURE)
