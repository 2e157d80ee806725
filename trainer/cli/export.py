"""``trainer export RUN_DIR``: a Hugging Face directory of a checkpoint, checked before it is handed over."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run directory.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="Where to write (default: RUN_DIR/export).", show_default=False)
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Checkpoint to export (default: the newest).", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16 (default: the run's).", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier export wrote.")] = False,
) -> None:
    """Write a checkpoint as safetensors + config + tokenizer that plain transformers loads."""
    from trainer.core.quiet import quiet_transformers

    quiet_transformers()
    from trainer.checkpoint.export import export_checkpoint

    target = export_checkpoint(
        run_directory, output or run_directory / "export", step=step, dtype=dtype, overwrite=overwrite
    )
    typer.echo(f"exported to {target}")
