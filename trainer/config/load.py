"""Turn a recipe file and command-line overrides into a ``Recipe``, or into everything that is wrong with them.

Precedence: defaults < ``extends`` < recipe < command line. Mappings are merged key by key, lists are replaced.
Example: the base says ``batch.micro_size: 2``, the recipe says 4, ``batch.micro_size=8`` on the command line wins.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from trainer.config.lock import apply_lock
from trainer.config.run import Recipe
from trainer.config.schema import build_recipe, json_schema, recipe_problems
from trainer.config.yaml_text import YamlTextError, dump_yaml, parse_yaml
from trainer.core.errors import Problem, RecipeError

__all__ = ["json_schema", "load_recipe", "read_mapping", "recipe_problems", "recipe_to_yaml"]

MAXIMUM_BYTES = 1_000_000
PATH_LISTS = ("data.train", "data.validation")
PATHS = (
    "run.directory",
    "model.path",
    "tokenizer.path",
    "deepspeed.base",
    "launch.hostfile",
    *(f"{key}.path" for key in PATH_LISTS),
)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read the recipe at ``path``, lay ``section.key=value`` overrides over it and check it against the schema.

    Raises:
        RecipeError: with every problem of the file, its base and the overrides.
    """
    mapping, problems = read_mapping(path, overrides)
    recipe, more = build_recipe(mapping) if mapping is not None else (None, [])
    if recipe is None or problems or more:
        raise RecipeError([*problems, *more], title=f"recipe {path} refused")
    return recipe


def read_mapping(
    path: str | Path,
    overrides: Iterable[str] = (),
    under: Mapping[str, Any] | None = None,
    *,
    locked: bool = True,
) -> tuple[dict[str, Any] | None, list[Problem]]:
    """Return the merged, unchecked mapping (None if a file can't be read) and the problems met on the way.

    ``under`` are values that the recipe is laid over: those of a site profile. With ``locked``, Hugging Face ids are
    at the commits of the lock beside the recipe, where there is one.
    """
    recipe, problems = _read_file(Path(path), "recipe")
    if recipe is None:
        return None, problems
    if "extends" in recipe:
        base, more = _read_base(Path(path), recipe.pop("extends"))
        problems += more
        if base is None:
            return None, problems  # without the base nearly every key would be reported as missing
        recipe = merge(base, recipe)
    if under is not None:
        recipe = merge(under, recipe)
    for override in overrides:
        problem = _apply_override(recipe, override)
        if problem is not None:
            problems.append(problem)
    mapping = _home_expanded(recipe, "")
    if locked:
        problems += apply_lock(mapping, Path(path))
    return mapping, problems


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``over`` laid over it: mappings key by key, everything else replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(cast("Mapping[str, Any]", below), cast("Mapping[str, Any]", value))
        else:
            merged[key] = value
    return merged


def recipe_to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe, defaults included, as YAML that ``load_recipe`` reads back to an equal recipe."""
    return dump_yaml(recipe.model_dump(mode="json"))


def _read_base(recipe_path: Path, extends: Any) -> tuple[dict[str, Any] | None, list[Problem]]:
    if not isinstance(extends, str) or not extends:
        return None, [Problem("extends", extends, "must be the path of one recipe", "write a path, e.g. base.yaml")]
    base, problems = _read_file(recipe_path.parent / extends, "extends")
    if base is not None and "extends" in base:
        rule = "the base extends another recipe; only one level is allowed"
        return None, [*problems, Problem("extends", extends, rule, "copy the keys you need into one base")]
    return base, problems


def _read_file(path: Path, key: str) -> tuple[dict[str, Any] | None, list[Problem]]:
    def refused(rule: str, fix: str = "") -> tuple[None, list[Problem]]:
        return None, [Problem(key, str(path), rule, fix)]

    try:
        if path.is_dir():
            return refused("is a directory", "name the YAML file in it")
        if path.stat().st_size > MAXIMUM_BYTES:
            return refused(f"is larger than {MAXIMUM_BYTES} bytes", "give a recipe, not data")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return refused("no such file", "check the path")
    except UnicodeDecodeError as error:
        return refused(f"is not UTF-8 text (byte {error.start})", "save it as UTF-8")
    except (OSError, ValueError) as error:
        return refused(f"can't be read: {getattr(error, 'strerror', None) or error}")
    try:
        value = parse_yaml(text)
    except YamlTextError as error:
        return refused(f"is not a valid recipe: {error}")
    if not isinstance(value, dict):
        found = "empty" if value is None else f"a {type(value).__name__}"
        return refused(f"must be a mapping of sections, but is {found}", "start with run:, model:, data:, batch:")
    mapping = cast("dict[Any, Any]", value)
    for name in mapping:
        if not isinstance(name, str):
            return refused(f"the key {name!r} must be text", "rename it")
    return cast("dict[str, Any]", mapping), []


def _home_expanded(value: Any, key: str) -> Any:
    """Return ``value`` with a leading ``~`` of every path replaced, so that what is written down is what was used."""
    if isinstance(value, dict):
        return {
            name: _home_expanded(below, f"{key}.{name}" if key else str(name))
            for name, below in cast("dict[Any, Any]", value).items()
        }
    if isinstance(value, list) and key in PATH_LISTS:
        return [_home_expanded(below, key) for below in cast("list[Any]", value)]
    if isinstance(value, str) and key in PATHS:
        return os.path.expanduser(value)
    return cast("Any", value)


def _apply_override(mapping: dict[str, Any], override: str) -> Problem | None:
    """Set one ``section.key=value`` in place; list items are addressed by index, one past the end appends."""
    name, equals, text = override.partition("=")
    if not equals:
        return Problem("command line", override, "is not section.key=value", "write e.g. optimizer.learning_rate=1e-4")
    parts = name.split(".")
    if not all(parts):
        return Problem("command line", override, "has an empty key", "write section.key=value")
    try:
        value = parse_yaml(text)
    except YamlTextError as error:
        return Problem(name, text, f"the value is not valid YAML: {error}", "quote it")
    parent: Any = mapping
    for depth, part in enumerate(parts):
        here = ".".join(parts[:depth]) or "the recipe"
        last = depth == len(parts) - 1
        if isinstance(parent, list):
            items = cast("list[Any]", parent)
            if not part.isdecimal() or int(part) > len(items):
                return Problem(name, value, f"{here} is a list of {len(items)}", f"use an index up to {len(items)}")
            if int(part) == len(items):
                items.append(None)
            step: Any = int(part)
        elif isinstance(parent, dict):
            cast("dict[str, Any]", parent).setdefault(part, None)
            step = part
        else:
            return Problem(name, value, f"{here} is a single value and has no keys", f"set {here} itself")
        if last:
            parent[step] = value
        elif parent[step] is None:
            parent[step] = [] if parts[depth + 1].isdecimal() else {}
        parent = cast("Any", parent[step])
    return None
