"""Refuse a bad run before anything is started or written, with all of its problems at once.

``trainer check`` and ``trainer train`` call the same ``prepare``, so that they refuse the same runs in the same words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from trainer.config.deepspeed_file import read_deepspeed_file
from trainer.config.deepspeed_json import deepspeed_problems, resolve_deepspeed
from trainer.config.derive import Derived, derive, world_size_of
from trainer.config.load import read_mapping
from trainer.config.run import Recipe
from trainer.config.schema import build_recipe, without_refused
from trainer.core.errors import Problem, RecipeError
from trainer.preflight.facts import Facts
from trainer.preflight.rules import RULES


@dataclass(frozen=True)
class Prepared:
    """A run that may start."""

    recipe: Recipe
    derived: Derived
    deepspeed: dict[str, Any]
    """The resolved DeepSpeed JSON."""


def prepare(
    recipe_path: str | Path, overrides: Iterable[str] = (), world_size: int | None = None,
    under: Mapping[str, Any] | None = None,
) -> Prepared:  # fmt: skip
    """Load, derive, resolve and check a run of ``world_size`` ranks (None: as many as the recipe starts itself).

    ``under`` is what the recipe is laid over (a site profile).

    Raises:
        RecipeError: with every problem found, those of the recipe's own text first.
    """
    title = f"{recipe_path} refused"
    mapping, problems = read_mapping(recipe_path, overrides, under)
    recipe, more = build_recipe(mapping) if mapping is not None else (None, [])
    problems += more
    if recipe is None or problems:
        if mapping is not None:
            problems += _beyond_the_schema(mapping, world_size)
        raise RecipeError(_distinct(problems), title=title)
    ranks = world_size_of(recipe) if world_size is None else world_size
    raise_if_refused(recipe, ranks, title)
    derived = derive(recipe, ranks)
    return Prepared(recipe, derived, resolve_deepspeed(recipe, derived))


def check(recipe: Recipe, world_size: int) -> list[Problem]:
    """Return every problem of running ``recipe`` on ``world_size`` ranks that can be known without torch."""
    return check_facts(Facts(recipe, world_size))


def check_facts(facts: Facts) -> list[Problem]:
    """Return what the rules and the DeepSpeed JSON say of ``facts``."""
    problems = [problem for rule in RULES for problem in rule.check(facts)]
    problems += deepspeed_problems(facts.recipe, facts.derived)
    return _distinct(problems)


def raise_if_refused(recipe: Recipe, world_size: int, title: str = "recipe refused") -> None:
    """Raise RecipeError with every problem of ``check``, if there is any."""
    problems = check(recipe, world_size)
    if problems:
        raise RecipeError(problems, title=title)


def _beyond_the_schema(mapping: Mapping[str, Any], world_size: int | None) -> list[Problem]:
    """Return what can be said of a recipe that breaks the schema, without guessing at what was meant."""
    rest, left_out = without_refused(mapping)
    recipe, _ = build_recipe(rest)
    if recipe is not None:
        found = check(recipe, world_size_of(recipe) if world_size is None else world_size)
        # What stands in for a refused value is not the user's.
        return [problem for problem in found if problem.key not in left_out]
    section = mapping.get("deepspeed")
    given: Mapping[str, Any] = cast("Mapping[str, Any]", section) if isinstance(section, Mapping) else {}
    base, override = given.get("base", "zero1"), given.get("override", {})
    if not isinstance(base, str) or not isinstance(override, Mapping):
        return []
    return read_deepspeed_file(base, cast("Mapping[str, Any]", override))[1]


def _distinct(problems: Iterable[Problem]) -> list[Problem]:
    kept: dict[tuple[str, str], Problem] = {}
    for problem in problems:
        kept.setdefault((problem.key, problem.rule), problem)
    return list(kept.values())
