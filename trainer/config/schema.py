"""Check a mapping against the recipe's schema and say what is wrong in plain words."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, Union, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trainer.config.launch import SlurmConfig
from trainer.config.model import source_rule
from trainer.config.run import Recipe, length_rule
from trainer.config.section import Section, descriptions
from trainer.config.suggest import nearest
from trainer.core.errors import Problem

# Names that users bring from Hugging Face's Trainer, axolotl, DeepSpeed and Megatron.
FOREIGN_NAMES = {
    "lr": "optimizer.learning_rate",
    "max_steps": "run.steps",
    "train_iters": "run.steps",
    "output_dir": "run.directory",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "seq_length": "data.sequence_length",
    "seq_len": "data.sequence_length",
    "max_seq_length": "data.sequence_length",
    "sequence_len": "data.sequence_length",
    "train_batch_size": "batch.global_size",
    "global_batch_size": "batch.global_size",
    "micro_batch_size": "batch.micro_size",
    "rampup_batch_size": "batch.warmup",
    "per_device_train_batch_size": "batch.micro_size",
    "train_micro_batch_size_per_gpu": "batch.micro_size",
    "gradient_checkpointing": "memory.activation_checkpointing",
    "max_grad_norm": "optimizer.clip_norm",
    "gradient_clipping": "optimizer.clip_norm",
    "eps": "optimizer.epsilon",
    "lr_scheduler": "schedule.name",
    "lr_scheduler_type": "schedule.name",
    "save_steps": "checkpoint.every_steps",
    "save_interval": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "eval_steps": "evaluation.every_steps",
    "logging_steps": "telemetry.log_every_steps",
    "zero_stage": "deepspeed.base",
    "num_gpus": "launch.processes",
}


def recipe_problems(mapping: Mapping[str, Any]) -> list[Problem]:
    """Return everything in ``mapping`` that breaks the schema: unknown keys, wrong types, ranges, missing keys."""
    return _validate(mapping)[1]


def build_recipe(mapping: Mapping[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    """Return the recipe of ``mapping`` and its problems; the recipe is None where there are any."""
    return _validate(mapping)


def slurm_section_problems(values: Mapping[str, Any]) -> list[Problem]:
    """Return what in ``values`` breaks the schema of ``launch.slurm``, with the keys of that section alone."""
    at = ("launch", "slurm")
    try:
        SlurmConfig.model_validate(dict(values))
    except ValidationError as error:
        found = [_problem({**details, "loc": (*at, *details["loc"])}) for details in error.errors(include_url=False)]
        prefix = ".".join(at) + "."
        distinct = {problem.key: problem for problem in reversed(found)}  # a union reports one error per member
        return [replace(problem, key=key.removeprefix(prefix)) for key, problem in reversed(distinct.items())]
    return []


def without_refused(mapping: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Return a copy of ``mapping`` less what the schema refuses, and the dotted keys left out.

    Defaults stand in for them, so that the rest can still be checked.
    """
    copy = _copied(dict(mapping))
    left_out: set[str] = set()
    try:
        Recipe.model_validate(copy)
    except ValidationError as error:
        # Backwards: entries of a list keep their numbers.
        for details in reversed(error.errors()):
            path = details["loc"]
            if path and _remove(copy, path):
                left_out.add(".".join(str(part) for part in path))
    return copy, left_out


def _remove(mapping: dict[str, Any], path: tuple[int | str, ...]) -> bool:
    parent: Any = mapping
    try:
        for part in path[:-1]:
            parent = parent[part]
        del parent[path[-1]]
    except (KeyError, IndexError, TypeError):
        return False
    return True


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe file, with a description of every field."""
    schema = Recipe.model_json_schema()
    extends = {"type": "string", "description": "Recipe this one is laid over; relative to this file; one level."}
    schema["properties"] = {"extends": extends, **schema["properties"]}
    return schema


def _validate(mapping: Mapping[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    try:
        return Recipe.model_validate(dict(mapping)), []
    except ValidationError as error:
        errors = error.errors(include_url=False)
    problems: dict[str, Problem] = {}
    for details in errors:
        below = any(len(other["loc"]) > len(details["loc"]) and _inside(other, details) for other in errors)
        if details["type"] == "too_short" and below:
            continue  # pydantic counts only the valid entries of a list
        problem = _problem(details)
        problems.setdefault(problem.key, problem)  # a union reports one error per member
    for problem in _rules_across_keys(mapping):
        problems.setdefault(problem.key, problem)
    return None, list(problems.values())


def _inside(inner: ErrorDetails, outer: ErrorDetails) -> bool:
    return inner["loc"][: len(outer["loc"])] == outer["loc"]


def _rules_across_keys(mapping: Mapping[str, Any]) -> Iterator[Problem]:
    """Apply the rules that pydantic skips where a key of the same section is wrong already."""
    for name, rule in (("run", length_rule), ("model", source_rule)):
        section = mapping.get(name)
        broken = rule(cast("Mapping[str, Any]", section)) if isinstance(section, Mapping) else None
        if broken is not None:
            context = broken.context or {}
            key = f"{name}.{context['key']}" if context["key"] else name
            yield Problem(key, None, context["rule"], context["fix"])


def _problem(details: ErrorDetails) -> Problem:
    path, annotation = _known_path(details["loc"])
    context = details.get("ctx", {})
    if details["type"] == "extra_forbidden":
        return _unknown_key(path, details["input"])
    if details["type"] == "broken_rule":
        key = ".".join(part for part in (*path, context["key"]) if part)
        shown = None if isinstance(details["input"], dict) else details["input"]
        return Problem(key, shown, context["rule"], context["fix"])
    if details["type"] == "missing":
        return Problem(".".join(path), None, "is required", _describe(path))
    rule, fix = _rule(details, annotation)
    shown = details["input"]
    return Problem(".".join(path), None if isinstance(shown, dict | list | tuple) else shown, rule, fix)


def _rule(details: ErrorDetails, annotation: Any) -> tuple[str, str]:
    kind, context, value = details["type"], details.get("ctx", {}), details["input"]
    bounds = {"greater_than": "more than", "greater_than_equal": "at least", "less_than": "less than"}
    bounds["less_than_equal"] = "at most"
    if kind in bounds:
        limit = next(iter(context.values()))
        return f"must be {bounds[kind]} {limit}", f"use a value {bounds[kind]} {limit}"
    if kind == "literal_error":
        choices = [str(choice) for choice in _choices(annotation)]
        close = nearest(value, choices) if isinstance(value, str) else None
        return f"must be one of {', '.join(choices)}", f"did you mean {close}?" if close else f"use {choices[0]}"
    if kind == "finite_number":
        return "must be a finite number, not NaN or infinity", "write a number"
    if kind == "none_required":
        return "is not available in this version", "set it to null"
    if kind == "string_pattern_mismatch":
        return f"must match {context['pattern']}", "use letters, digits, '.', '_' and '-', a letter or digit first"
    if kind in ("too_short", "too_long"):
        limit = context.get("min_length", context.get("max_length"))
        bound = "at least" if kind == "too_short" else "at most"
        return f"needs {bound} {limit} {'entry' if limit == 1 else 'entries'}", "add or remove entries"
    nouns = {"tuple_type": "a list", "dict_type": "a mapping of keys to values", "model_type": "a mapping of keys"}
    nouns |= {"string_type": "text", "int_type": "a whole number", "int_from_float": "a whole number"}
    nouns |= {"int_parsing": "a whole number", "float_type": "a number", "float_parsing": "a number"}
    nouns |= {"bool_type": "true or false", "bool_parsing": "true or false", "invalid_key": "text"}
    if kind in nouns:
        return f"must be {nouns[kind]}", f"write {nouns[kind]}"
    return details["msg"][0].lower() + details["msg"][1:], ""


def _unknown_key(path: list[str], value: Any) -> Problem:
    name, parent = path[-1], path[:-1]
    siblings = _siblings(parent)
    shown = None if isinstance(value, dict | list) else value
    close = nearest(name, siblings)
    if close is not None:
        return Problem(".".join(path), shown, "is not a known key", f"did you mean {close}?")
    for full in _dotted_names():
        if full.rsplit(".", 1)[-1] == name:
            return Problem(".".join(path), shown, "is not a known key here", f"{name} belongs to {full}")
    if name in FOREIGN_NAMES:
        return Problem(".".join(path), shown, "is not a known key", f"it is called {FOREIGN_NAMES[name]} here")
    if name == "gradient_accumulation_steps":
        fix = "remove it: it is derived as batch.global_size / (batch.micro_size x data-parallel ranks)"
        return Problem(".".join(path), shown, "is not a known key", fix)
    leaves = {full.rsplit(".", 1)[-1]: full for full in reversed(_dotted_names())}
    far = nearest(name, leaves)
    if far is not None:
        return Problem(".".join(path), shown, "is not a known key here", f"did you mean {leaves[far]}?")
    return Problem(".".join(path), shown, "is not a known key", f"known here: {', '.join(siblings)}")


def _known_path(location: tuple[int | str, ...]) -> tuple[list[str], Any]:
    """Return the dotted path of an error and the annotation there, less the union tags that pydantic puts between."""
    path: list[str] = []
    annotation: Any = Recipe
    for part in location:
        options = _options(annotation)
        section = next((option for option in options if _is_section(option)), None)
        if isinstance(part, int):
            path.append(str(part))
            annotation = _item_type(options)
        elif section is not None and part in section.model_fields:
            path.append(part)
            annotation = section.model_fields[part].annotation
        elif section is not None or any(get_origin(option) is dict for option in options):
            path.append(part)
            annotation = Any
    return path, annotation


def _siblings(parent: list[str]) -> list[str]:
    annotation: Any = Recipe
    for part in parent:
        options = _options(annotation)
        section = next((option for option in options if _is_section(option)), None)
        if part.isdigit():
            annotation = _item_type(options)
        elif section is not None and part in section.model_fields:
            annotation = section.model_fields[part].annotation
    section = next((option for option in _options(annotation) if _is_section(option)), None)
    return list(section.model_fields) + (["extends"] if section is Recipe else []) if section is not None else []


@cache
def _dotted_names() -> tuple[str, ...]:
    return tuple(_walk(Recipe, ""))


def _walk(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for option in _options(field.annotation):
            if _is_section(option):
                yield from _walk(option, f"{prefix}{name}.")
            elif get_origin(option) is tuple and _is_section(get_args(option)[0]):
                yield from _walk(get_args(option)[0], f"{prefix}{name}.0.")


def _options(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _item_type(options: tuple[Any, ...]) -> Any:
    return next((get_args(option)[0] for option in options if get_origin(option) is tuple), Any)


def _choices(annotation: Any) -> tuple[Any, ...]:
    return tuple(choice for option in _options(annotation) for choice in get_args(option))


def _describe(path: list[str]) -> str:
    """Return the description of a missing key as its fix."""
    annotation: Any = Recipe
    text = ""
    for part in path:
        options = _options(annotation)
        section = next((option for option in options if _is_section(option)), None)
        if section is not None and part in section.model_fields:
            field = section.model_fields[part]
            annotation, text = field.annotation, descriptions(section).get(part, "")
        elif part.isdigit():
            annotation = _item_type(options)
    return f"add it: {text}" if text else "add it"


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(child) for key, child in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list):
        return [_copied(child) for child in cast("list[Any]", value)]
    return value
