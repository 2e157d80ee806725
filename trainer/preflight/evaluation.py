"""Rules about evaluations and what depends on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.core.errors import Problem
from trainer.preflight.data import write_tiny_shard
from trainer.preflight.facts import Facts, Failing, Rule

_EVERY_FIX = "set it to a number of steps, e.g. checkpoint.every_steps"


def _early_stopping(facts: Facts) -> Iterator[Problem]:
    recipe, stopping = facts.recipe, facts.recipe.evaluation.early_stopping
    if stopping is None:
        return
    names = [source.name for source in recipe.data.validation]
    if not names:
        rule = "there is no validation data to tell by"
        yield Problem("evaluation.early_stopping", None, rule, "give data.validation, or set it to null")
    elif stopping.metric is not None and stopping.metric not in names:
        rule = f"is no name of a source in data.validation ({', '.join(names)})"
        yield Problem(
            "evaluation.early_stopping.metric", stopping.metric, rule, f"use {names[0]}, or null for the mean"
        )
    if recipe.evaluation.every_steps is None:
        rule = "is null: early stopping would be asked at step 0 and at the end only"
        yield Problem("evaluation.every_steps", None, rule, _EVERY_FIX)


def _keep_best(facts: Facts) -> Iterator[Problem]:
    recipe = facts.recipe
    if not recipe.checkpoint.keep_best:
        return
    if not recipe.data.validation:
        rule = "there is no validation data to tell the best by"
        yield Problem("checkpoint.keep_best", True, rule, "give data.validation, or set it to false")
    if recipe.evaluation.every_steps is None:
        rule = "is null: checkpoint.keep_best would have the last step alone to choose from"
        yield Problem("evaluation.every_steps", None, rule, _EVERY_FIX)


def _one_source(tmp: Path) -> dict[str, Any]:
    shard = write_tiny_shard(tmp / "valid", 200, vocab_size=64, dtype="uint16", num_tokens=200)
    return {"data.validation": [{"name": "books", "path": shard}]}


RULES = (
    Rule(
        "early stopping has something to tell by",
        _early_stopping,
        Failing({"evaluation.early_stopping": {"patience": 3}, "evaluation.every_steps": 2}),
    ),
    Rule(
        "early stopping is asked while training",
        _early_stopping,
        Failing({"evaluation.early_stopping": {"patience": 3}}, prepare=_one_source),
    ),
    Rule(
        "early stopping by a source that is there",
        _early_stopping,
        Failing(
            {"evaluation.early_stopping": {"patience": 3, "metric": "code"}, "evaluation.every_steps": 2},
            prepare=_one_source,
        ),
    ),
    Rule(
        "a best checkpoint needs validation data",
        _keep_best,
        Failing({"checkpoint.keep_best": True, "evaluation.every_steps": 2}),
    ),
    Rule(
        "a best checkpoint needs evaluations", _keep_best, Failing({"checkpoint.keep_best": True}, prepare=_one_source)
    ),
)
