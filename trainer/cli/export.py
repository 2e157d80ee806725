"""``trainer export RUN_DIR``: a Hugging Face directory of a checkpoint, checked before it is handed over."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer


def export(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run directory.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(help="Where to write (default: RUN_DIR/export, or RUN_DIR/trained).", show_default=False),
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Checkpoint to export (default: the newest).", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (default: the run's).", show_default=False)
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, e.g. 500MB; more make several.")] = "5GB",
    only_trained: Annotated[
        bool, typer.Option("--only-trained", help="Only the tensors that were trained, where others were frozen.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier export wrote.")] = False,
) -> None:
    """Write a checkpoint as safetensors + config + tokenizer that plain transformers loads."""
    from trainer.core.quiet import quiet_transformers

    quiet_transformers()
    from trainer.checkpoint.export import MAX_SHARD_BYTES, export_checkpoint
    from trainer.cli.data_shards import parse_shard_size
    from trainer.core.errors import Problem, RefusedError

    problems: list[Problem] = []
    try:
        max_shard_bytes = parse_shard_size(max_shard_size, "--max-shard-size") or MAX_SHARD_BYTES
    except RefusedError as error:
        problems, max_shard_bytes = error.problems, MAX_SHARD_BYTES

    # The default would end the process at once, and leave what is half written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    export_checkpoint(
        run_directory,
        output or run_directory / ("trained" if only_trained else "export"),
        step=step,
        dtype=dtype,
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
        only_trained=only_trained,
        problems=problems,
        say=typer.echo,
    )
