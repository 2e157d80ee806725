"""``trainer evaluate MODEL_OR_RUN --data PREFIX``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RUN", help="Exported directory, run directory or Hugging Face id.", show_default=False
        ),
    ],
    data: Annotated[Path, typer.Option(help="Prefix of token shards.", show_default=False)],
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens per sequence (default: the run's, or 512).", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print loss and perplexity of a model on token shards, in one process."""
    import json

    from trainer.core.quiet import quiet_transformers

    quiet_transformers()
    from trainer.evaluation.standalone import evaluate_model

    result = evaluate_model(model, data, sequence_length=sequence_length, batch_size=batch_size)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        typer.echo(
            f"loss {result['loss']:.6f} nats/token, perplexity {result['perplexity']:.3f}, "
            f"{result['target_tokens']:,} tokens"
        )
