"""Find out at the start whether the run can be exported at its end, and keep what that takes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from trainer.checkpoint.agreement import Ranks
from trainer.checkpoint.export import kept_tokenizer
from trainer.config.run import Recipe
from trainer.core.errors import DataError, Problem, RefusedError
from trainer.data.encoder import tokenizer_hash
from trainer.data.loader import TrainLoader
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


def refuse_other_tokenizer(
    tokenizer: Any, loader: TrainLoader, vocab_size: int, ranks: Ranks, *, pretrained: bool
) -> None:
    """Raise DataError on every rank if the run's tokenizer didn't make the shards, or has ids beyond the model's."""
    problems: list[Problem] = []
    if tokenizer is not None:
        found, ids = tokenizer_hash(tokenizer), max(tokenizer.get_vocab().values()) + 1
        for source in loader.sources:
            stated = source.shards.tokenizer_hash
            if stated is not None and stated != found:
                rule = f"isn't the tokenizer of {source.shards.path} (hash {found}, the shards say {stated})"
                fix = "name the tokenizer that made the shards, or tokenize the text again"
                problems.append(Problem("tokenizer.path", tokenizer.name_or_path, rule, fix))
        if ids > vocab_size:
            rule = f"has {ids} ids, the model's embedding {vocab_size} rows"
            fix = f"set model.vocabulary_size to {ids}" if pretrained else "raise the model's vocab_size"
            problems.append(Problem("tokenizer.path", tokenizer.name_or_path, rule, fix))
    if problems := ranks.from_first(problems):
        raise DataError(problems, title="data")


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
