"""Find out at the start whether the run can be exported at its end, and keep what that takes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from trainer.checkpoint.agreement import Ranks
from trainer.checkpoint.export import kept_tokenizer
from trainer.config.run import Recipe
from trainer.core.errors import RefusedError
from trainer.models.tokenizer import load_tokenizer


def load_on_first_rank(recipe: Recipe, ranks: Ranks) -> Any:
    """Return the recipe's tokenizer on rank 0, None elsewhere or where none is named.

    Raises RefusedError on every rank alike if it can't be loaded.
    """
    tokenizer, refused = None, None
    if recipe.tokenizer.path is not None and ranks.rank == 0:
        try:
            tokenizer = load_tokenizer(recipe.tokenizer.path, recipe.tokenizer.revision)
        except RefusedError as error:
            refused = error.problems
    if (problems := ranks.from_first(refused)) is not None:
        raise RefusedError(problems)
    return tokenizer


def keep(tokenizer: Any, recipe: Recipe) -> None:
    """Copy the tokenizer to RUN/tokenizer, unless it lies there already."""
    target = kept_tokenizer(Path(recipe.run.directory))
    if tokenizer is None or Path(recipe.tokenizer.path or "").resolve() == target.resolve():
        return
    temporary = target.with_name(".tokenizer.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
