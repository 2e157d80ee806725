"""What a manifest may say before anything is allocated or opened on its word: types, names, ranges, sizes.

A manifest may have been written by somebody else, and hashes don't help then: who writes one states the hashes.
Torch-free.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

ITEM_BYTES = {
    "float32": 4, "float64": 8, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
_FLOATS = ("float32", "bfloat16", "float16")
_MOST_RANKS = 2**20
_MOST_DIMS = 16
_MOST_DEPTH = 64
_NAME = re.compile(r"[^\x00-\x1f\x7f/\\]{1,500}")
"""Of a tensor or state: never a path, but shown to people and written into other files."""
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_COUNTERS = (
    "step", "consumed_samples", "tokens", "target_tokens", "optimizer_steps", "skipped_steps", "consecutive_skips",
    "corrupt_samples",
)  # fmt: skip


def unsound(manifest: Mapping[str, Any]) -> str | None:
    """Return the first thing that can't be true of a manifest, by its field, None if there is none.

    It must be of a known version, and ``layout.find_problems`` must have found nothing.
    """
    return next(_problems(manifest), None)


def unsound_facts(manifest: Mapping[str, Any]) -> str | None:
    """Return what can't be true of counters and model, None if nothing: those are few, and are read by many."""
    for name in ("state", "model"):
        if not isinstance(manifest.get(name, {}), dict):
            return f"{name} is no mapping"
    state, model = _mapping(manifest.get("state")), _mapping(manifest.get("model"))
    return next(_state(state), None) or next(_model(model, len(_mapping(manifest.get("tensors")))), None)


def uncovered(manifest: Mapping[str, Any]) -> str | None:
    """Return the first state of which elements lie in no file, None if all are there. ``unsound`` found nothing."""
    for name, entry in manifest["tensors"].items():
        for key, state in entry["states"].items():
            held: dict[tuple[int, ...] | None, int] = {}
            for _, _, count, *cut in state["slices"]:
                part = tuple(cut[0]) if cut else None
                held[part] = held.get(part, 0) + count
            num_elements = math.prod(entry["shape"])
            parts = {part: num for part, num in held.items() if part is not None}
            complete = held.get(None) == num_elements or not num_elements
            complete = complete or (len({part[1] for part in parts}) == next(iter(parts), (0, 0, 0))[2] > 0)
            if not complete or any(num * part[2] != num_elements for part, num in parts.items()):
                return f"tensors.{name!r}.states.{key!r}.slices leave elements out"
    return None


def _problems(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong. Stop at the first: later rules build on earlier ones."""
    sizes = {name: facts["bytes"] for name, facts in manifest["files"].items()}
    world_size, shards = manifest.get("world_size"), _list(manifest.get("shards"))
    if not _is_count(world_size) or not 1 <= cast("int", world_size) <= _MOST_RANKS:
        yield f"world_size is {world_size!r}, no number of ranks"
    if shards is None or not all(isinstance(name, str) and name in sizes for name in shards):
        yield "shards is no list of names that files lists"
        return
    if len(shards) != world_size:
        yield f"shards has {len(shards)} names for {world_size} ranks"
    for name in ("tensors", "state", "model"):  # find_problems has seen to what is in the last two
        if not isinstance(manifest.get(name), dict):
            yield f"{name} is no mapping"
    for name, kind in (("recipe", dict), ("topology", dict), ("libraries", dict), ("frozen", list)):
        if not isinstance(manifest.get(name, kind()), kind | None):
            yield f"{name} is no {'list' if kind is list else 'mapping'}"
    if not all(isinstance(name, str) for name in manifest.get("frozen") or ()):
        yield "frozen is no list of names"
    for name, value in manifest.items():
        if name != "tensors" and _is_deep(value):
            yield f"{name} is nested more than {_MOST_DEPTH} levels deep"
    for name, entry in manifest["tensors"].items():
        yield from _tensor(name, entry, [sizes[shard] for shard in shards], sum(sizes.values()))


def _tensor(name: str, entry: object, shard_bytes: list[int], total_bytes: int) -> Iterator[str]:
    field = f"tensors.{name[:200]!r}"
    if not _NAME.fullmatch(name):
        yield f"{field} is no name of a tensor"
    entry = _mapping(entry)
    shape = _list(entry.get("shape"))
    if shape is None or len(shape) > _MOST_DIMS or not all(_is_count(size) for size in shape):
        yield f"{field}.shape is no shape"
        return
    if not isinstance(entry.get("states"), dict):
        yield f"{field}.states is no mapping"
    for key, state in _mapping(entry.get("states")).items():
        where = f"{field}.states.{key[:200]!r}"
        facts = _mapping(state)
        dtype, slices = facts.get("dtype"), _list(facts.get("slices"))
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            yield f"{where}: unknown dtype {str(dtype)[:50]!r}"
            return
        if slices is None or not _NAME.fullmatch(key):
            yield f"{where} has no slices, or is no name"
            return
        if math.prod(shape) * ITEM_BYTES[dtype] > total_bytes:
            yield f"{field}.shape is larger than all files together"
        yield from _slices(where, slices, tuple(shape), ITEM_BYTES[dtype], shard_bytes)


def _slices(
    where: str, slices: list[Any], shape: tuple[int, ...], item_bytes: int, shard_bytes: list[int]
) -> Iterator[str]:
    """Yield what is wrong with where a state's elements lie: each at most once, in a file that can hold it.

    What is nowhere is found when it is read, or by ``uncovered``.
    """
    groups: dict[tuple[int, ...] | None, list[tuple[int, int]]] = {}
    for number, entry in enumerate(slices):
        field = f"{where}.slices[{number}]"
        items = _list(entry) or []
        if len(items) not in (3, 4) or not all(_is_count(item) for item in items[:3]):
            yield f"{field} is no [shard, first element, number of elements]"
            return
        shard, start, count = items[:3]
        cut = _cut(items[3], shape) if len(items) == 4 else None
        if shard >= len(shard_bytes) or (len(items) == 4 and cut is None):
            yield f"{field} is of no shard, or no part, that there is"
            return
        if count * item_bytes > shard_bytes[shard]:
            yield f"{field} is larger than its file"
        groups.setdefault(cut, []).append((start, start + count))
    if len({cut[:1] + cut[2:] for cut in groups if cut is not None}) > 1:
        yield f"{where}.slices are of parts that don't make up one tensor"
    for cut, ranges in groups.items():
        expected, end = math.prod(shape) // (cut[2] if cut else 1), 0
        for low, high in sorted(ranges):
            if low < end:
                yield f"{where}.slices overlap at element {low}"
            end = high
        if end > expected:
            yield f"{where}.slices reach to {end} of {expected} elements"


def _cut(value: object, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return (dim, part, parts, chunks) if a tensor of ``shape`` can be cut so."""
    items = _list(value) or []
    if len(items) != 4 or not all(_is_count(item) for item in items):
        return None
    dim, part, parts, chunks = cast("list[int]", items)
    fits = dim < len(shape) and part < parts and chunks > 0 and shape[dim] % (parts * chunks) == 0
    return (dim, part, parts, chunks) if fits else None


def _state(state: Mapping[str, Any]) -> Iterator[str]:
    for name in ("train", "identity"):
        if not isinstance(state.get(name, {}), dict):
            yield f"state.{name} is no mapping"
            return
    counters = state.get("train", {})
    for name in _COUNTERS:
        if not _is_count(counters.get(name, 0)):
            yield f"state.train.{name} is {str(counters[name])[:50]!r}, no count"
    evaluated: object = counters.get("evaluated_step", -1)
    if type(evaluated) is not int or not -1 <= evaluated < 2**63:
        yield f"state.train.evaluated_step is {str(evaluated)[:50]!r}, no step"


def _model(model: Mapping[str, Any], num_tensors: int) -> Iterator[str]:
    if not isinstance(model.get("config", {}), dict):
        yield "model.config is no mapping"
    config = _mapping(model.get("config"))
    if not isinstance(config.get("model_type", ""), str):
        yield "model.config.model_type is no text"
    if model.get("dtype", "float32") not in _FLOATS:
        yield f"model.dtype is {str(model['dtype'])[:50]!r}, none of {', '.join(_FLOATS)}"
    for name in ("commit", "tokenizer", "tokenizer_revision"):
        value: object = model.get(name)
        if value is not None and (not isinstance(value, str) or "\0" in value or len(value) > 4096):
            yield f"model.{name} is no text"
    unpadded = model.get("unpadded_vocabulary_size")
    if unpadded is not None and (not _is_count(unpadded) or unpadded < 1):
        yield "model.unpadded_vocabulary_size is no number of tokens"
    yield from _config(config, num_tensors)


def _config(config: Mapping[str, Any], num_tensors: int) -> Iterator[str]:
    """Yield what would make building the model endless, or run code that is no part of transformers."""
    for name, value in config.items():
        # transformers takes "owner/name" there for a kernel to download and run.
        if "implementation" in name and not re.fullmatch(r"[a-z0-9_]+", str(value).lower()):
            yield f"model.config.{name[:100]} is {str(value)[:50]!r}, no implementation of transformers"
        if isinstance(value, int) and abs(value) >= 2**40:
            yield f"model.config.{name[:100]} is {str(value)[:50]}"
        if name in _LAYERS and isinstance(value, int) and value > num_tensors > 0:
            yield f"model.config.{name} is {value}, more than there are tensors"


def _list(value: object) -> list[Any] | None:
    return cast("list[Any]", value) if isinstance(value, list) else None


def _mapping(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _is_count(value: object) -> bool:
    """Return whether it is a whole number from 0; JSON's true is none."""
    return type(value) is int and 0 <= value < 2**63


def _is_deep(value: object) -> bool:
    """Return whether it is nested too deep, without recursion."""
    level = [value]
    for _ in range(_MOST_DEPTH):
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner += cast("dict[str, object]", item).values()
            elif isinstance(item, list):
                inner += cast("list[object]", item)
        level = inner
        if not level:
            return False
    return True
