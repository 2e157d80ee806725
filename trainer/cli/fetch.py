"""`trainer fetch`: bring models, tokenizers and data sets into the cache, for jobs without internet."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def fetch(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option("--dataset", metavar="ID[@REVISION]", help="A data set to tokenize without internet; repeat it."),
    ] = None,
    files: Annotated[
        list[str] | None,
        typer.Option("--files", metavar="PATTERN", help="Only such files of data sets ('en/*.parquet')."),
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="Take newer commits than the lock's.")] = False,
) -> None:
    """Download what a recipe names on the Hugging Face Hub and pin its commits in RECIPE.lock.json."""
    from trainer.launch.fetch import fetch as fetch_recipe
    from trainer.launch.profile import profile_of_recipe

    site = profile_of_recipe(recipe, overrides or [], os.environ)
    fetch_recipe(
        recipe, overrides or [], typer.echo, update=update, under=site.under if site else None,
        datasets=dataset or [], files=files or [],
    )  # fmt: skip
