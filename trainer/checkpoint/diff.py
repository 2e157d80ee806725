"""What two manifests say differently, field by field; tensors' contents are compared in tensor_diff."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

_NEVER_THE_SAME = ("created_unix", "recipe_digest", "files", "shards", "tensors", "version", "format")
"""Where bytes lie and when they were written; tensors are compared by themselves."""
_SHOWN = 60
_ABSENT = object()


def manifest_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return "section.key: old -> new" for each field of which two checkpoints hold different values."""
    first = {key: value for key, value in a.items() if key not in _NEVER_THE_SAME}
    second = {key: value for key, value in b.items() if key not in _NEVER_THE_SAME}
    return [f"{path}: {_text(old)} -> {_text(new)}" for path, old, new in _differences(first, second, "")]


def _differences(old: object, new: object, path: str) -> Iterator[tuple[str, object, object]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        first, second = cast("Mapping[str, object]", old), cast("Mapping[str, object]", new)
        for key in sorted(first.keys() | second.keys()):
            inner = f"{path}.{key}" if path else str(key)
            yield from _differences(first.get(key, _ABSENT), second.get(key, _ABSENT), inner)
    elif isinstance(old, list) and isinstance(new, list) and len(cast("list[Any]", old)) == len(cast("list[Any]", new)):
        for place, (one, other) in enumerate(zip(cast("list[Any]", old), cast("list[Any]", new), strict=True)):
            yield from _differences(one, other, f"{path}.{place}")
    elif old is _ABSENT or new is _ABSENT or json.dumps(old) != json.dumps(new):
        yield path, old, new


def _text(value: object) -> str:
    if value is _ABSENT:
        return "(none)"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
