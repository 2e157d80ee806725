"""``trainer generate MODEL_DIR --prompt TEXT``."""

from __future__ import annotations

from typing import Annotated

import typer


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_DIR", help="Exported directory or Hugging Face id.", show_default=False)
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this total.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
) -> None:
    """Continue a text."""
    from trainer.core.quiet import quiet_transformers

    quiet_transformers()
    from trainer.models.generate import generate_text

    typer.echo(
        generate_text(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    )
