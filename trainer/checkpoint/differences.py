"""What is different at a resume and may be: recipe, libraries, ranks and how they share the work. Torch-free."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

from pydantic import ValidationError

from trainer.config.run import Recipe
from trainer.core.redact import redacted

_OWN = ("run.directory", "telemetry.", "launch.", "checkpoint.accept_change")
"""Keys that say nothing about what is trained."""
_SHOWN_CHARACTERS = 60


def recipe_differences(stored: object, recipe: Recipe) -> list[str]:
    """Return one line a key whose value differs: "optimizer.learning_rate: 0.001 -> 0.003".

    ``stored`` is the ``recipe`` of a manifest; of a checkpoint without one nothing is known. Keys that the trainer of
    that time did not have count as their defaults.
    """
    if not isinstance(stored, dict):
        return []
    before = cast("dict[str, Any]", stored)
    with contextlib.suppress(ValidationError):  # of another version of the trainer: compared as it stands
        before = Recipe.model_validate(before).model_dump(mode="json")
    after = redacted(recipe.model_dump(mode="json"))  # as the stored one was
    then, now = dict(_leaves(before, "")), dict(_leaves(after, ""))
    return [
        f"{key}: {_shown(then.get(key))} -> {_shown(now.get(key))}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and not key.startswith(_OWN)
    ]


def library_differences(stored: object, installed: Mapping[str, str | None]) -> str | None:
    """Return a sentence about libraries of another major or minor version than the checkpoint's, None: none is."""
    before = cast("dict[str, Any]", stored) if isinstance(stored, dict) else {}
    changed = [
        f"{name} {then} -> {now}"
        for name, now in installed.items()
        if isinstance(then := before.get(name), str) and now is not None and _release(then) != _release(now)
    ]
    return f"other versions than the checkpoint's: {', '.join(changed)}" if changed else None


def shape_difference(manifest: Mapping[str, Any], topology: Mapping[str, int], dtype: str) -> str | None:
    """Return a sentence about another number of ranks, ZeRO stage, degree or dtype, None: all are the same.

    ``topology`` has the fields of the manifest's; those that a manifest lacks are passed over.
    """
    stored: object = manifest.get("topology")
    then = cast("dict[str, Any]", stored) if isinstance(stored, dict) else {"world_size": manifest.get("world_size")}
    model: object = manifest.get("model")
    dtype_then = cast("dict[str, Any]", model).get("dtype") if isinstance(model, dict) else None
    known = {name: value for name, value in then.items() if isinstance(value, int)}
    same_dtype = dtype_then in (None, dtype)
    if same_dtype and all(known.get(name, now) == now for name, now in topology.items()):
        return None
    was, runs = ("", "") if same_dtype else (f" in {dtype_then}", f" in {dtype}")
    return f"resuming a checkpoint of {_shape(known)}{was} as {_shape(topology)}{runs}"


def _shape(topology: Mapping[str, int]) -> str:
    """Return e.g. "ZeRO-1 x 4 ranks (pipeline 2)"."""
    stage = f"ZeRO-{topology['zero_stage']} x " if "zero_stage" in topology else ""
    count = topology.get("world_size", 0)
    axes = [(axis, topology.get(axis, 1)) for axis in ("pipeline", "tensor", "sequence", "expert")]
    degrees = ", ".join(f"{axis} {degree}" for axis, degree in axes if degree > 1)
    return f"{stage}{count} rank{'s' if count != 1 else ''}" + (f" ({degrees})" if degrees else "")


def _leaves(value: object, key: str) -> Iterator[tuple[str, object]]:
    """Yield (dotted key, value) of everything below; an item of a list is counted from 0."""
    below: Mapping[Any, object] | None = None
    if isinstance(value, dict) and value:
        below = cast("dict[Any, object]", value)
    elif isinstance(value, list) and value and isinstance(cast("list[object]", value)[0], dict):
        below = dict(enumerate(cast("list[object]", value)))
    if below is None:
        yield key, value
        return
    for name, item in below.items():
        yield from _leaves(item, f"{key}.{name}" if key else str(name))


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _release(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]
