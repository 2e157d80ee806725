"""``trainer checkpoint list|verify RUN_DIR``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.cli.checkpoint_import import import_checkpoint

app = typer.Typer(help="Look after the checkpoints of a run.", no_args_is_help=True)
app.command("import")(import_checkpoint)
_RunDirectory = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run directory.", show_default=False)]


@app.command("list")
def list_checkpoints(run_directory: _RunDirectory) -> None:
    """Show the committed checkpoints, oldest first."""
    from trainer.checkpoint import layout
    from trainer.core.units import format_bytes

    for step, path in _found(run_directory):
        manifest = layout.read_manifest(path) or {}
        size = sum(facts.get("bytes", 0) for facts in manifest.get("files", {}).values())
        problems = layout.find_problems(path)
        shape = f"{manifest.get('world_size', '?')} ranks"
        typer.echo(f"step {step:>8}  {format_bytes(size):>9}  {shape}  {'; '.join(problems) or 'complete'}")


@app.command("verify")
def verify(run_directory: _RunDirectory) -> None:
    """Read every file of every checkpoint and compare it with its manifest; exit code 1 if any differs."""
    from trainer.checkpoint.verify import damaged_files

    damaged = False
    for step, path in _found(run_directory):
        problems = damaged_files(path)
        damaged |= bool(problems)
        typer.echo(f"step {step}: {'; '.join(problems) or 'ok'}")
    raise typer.Exit(1 if damaged else 0)


def _found(run_directory: Path) -> list[tuple[int, Path]]:
    from trainer.checkpoint import layout
    from trainer.core.errors import Problem, RefusedError

    found = layout.step_directories(run_directory)
    if not found:
        raise RefusedError(
            Problem("RUN_DIR", str(run_directory), "holds no checkpoint", "give the run.directory of a recipe")
        )
    return found
