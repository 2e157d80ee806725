"""Read a DeepSpeed JSON strictly: duplicate keys, unknown keys and wrong types are refused at every level.

DeepSpeed itself ignores unknown keys at the top level and in several sections, so a typo silently loses a setting.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from trainer.config.suggest import nearest
from trainer.core.errors import Problem
from trainer.core.resources import resource_directory

KEYS = Path(__file__).with_name("deepspeed_keys.json")
TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int, float),  # 5e8 is how people write a bucket size
    "number": (int, float),
    "string": (str,),
    "mapping": (dict,),
}
NOUNS = {
    "bool": "true or false",
    "int": "a whole number",
    "number": "a number",
    "string": "text",
    "mapping": "a mapping of keys",
}


@dataclass(frozen=True)
class DeepSpeedFile:
    """The base JSON with ``deepspeed.override`` laid over it, "auto" values still in it."""

    base: str
    """Shown in problems: the file's path, or ``ds_configs/NAME.json``."""
    override: Mapping[str, Any]
    values: dict[str, Any]

    def key(self, path: str) -> str:
        """Return how a problem names the dotted ``path``: where the user can change it."""
        return f"deepspeed.override.{path}" if _has(self.override, path) else f"{self.base}: {path}"


def read_deepspeed_file(base: str, override: Mapping[str, Any]) -> tuple[DeepSpeedFile | None, list[Problem]]:
    """Return the merged JSON (None if the base can't be read) and everything wrong with its keys and types."""
    path, label, problems = _locate(base)
    if path is None:
        return None, problems
    values, problems = _read_json(path, label)
    if values is None:
        return None, problems
    merged = DeepSpeedFile(label, override, _overlaid(values, override))
    problems += [
        *_removed_problems(merged),
        *_section_problems(merged.values, key_table()["keys"], "", merged),
    ]
    return merged, problems


@cache
def key_table() -> dict[str, Any]:
    """Return the generated table of DeepSpeed's keys (tools/generate_deepspeed_keys.py)."""
    return json.loads(KEYS.read_text(encoding="utf-8"))


def base_names() -> list[str]:
    """Return the names in ds_configs/."""
    return sorted(path.stem for path in resource_directory("ds_configs").glob("*.json"))


def _locate(base: str) -> tuple[Path | None, str, list[Problem]]:
    names = base_names()
    if base in names:
        return resource_directory("ds_configs") / f"{base}.json", f"ds_configs/{base}.json", []
    path = Path(base)
    if path.is_file():
        return path, base, []
    if base.endswith(".json") or "/" in base:
        return None, base, [Problem("deepspeed.base", base, "no such file", "check the path")]
    close = nearest(base, names)
    fix = f"did you mean {close}?" if close else f"use one of {', '.join(names)} or a path ending in .json"
    return None, base, [Problem("deepspeed.base", base, "is neither a name in ds_configs/ nor a file", fix)]


def _read_json(path: Path, label: str) -> tuple[dict[str, Any] | None, list[Problem]]:
    duplicates: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: set[str] = set()
        for key, _ in items:
            if key in seen:
                duplicates.append(key)
            seen.add(key)
        return dict(items)

    def constant(name: str) -> float:
        raise ValueError(f"{name} is not a number JSON knows")

    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except UnicodeDecodeError as error:
        return None, [Problem("deepspeed.base", label, f"is not UTF-8 text (byte {error.start})", "save it as UTF-8")]
    except RecursionError:
        return None, [Problem("deepspeed.base", label, "is nested too deeply", "check the file")]
    except ValueError as error:
        rule = f"is not valid JSON: {error}"
        return None, [Problem("deepspeed.base", label, rule, "correct it; comments and trailing commas are not JSON")]
    except OSError as error:
        return None, [Problem("deepspeed.base", label, f"can't be read: {error.strerror}")]
    if not isinstance(value, dict):
        return None, [Problem("deepspeed.base", label, "must be a JSON object", "write {...}")]
    problems = [
        Problem(f"{label}: {key}", None, "is given twice in the same object", "remove one") for key in duplicates
    ]
    return cast("dict[str, Any]", value), problems


def _overlaid(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = _overlaid(cast("Mapping[str, Any]", below), cast("Mapping[str, Any]", value))
        else:
            merged[key] = value
    return merged


def _removed_problems(file: DeepSpeedFile) -> Iterator[Problem]:
    rule, fix = "was removed from DeepSpeed and would be ignored or refused by it", "remove it"
    for key in key_table()["removed"]:
        if key in file.values:
            yield Problem(file.key(key), None, rule, fix)
    zero = file.values.get("zero_optimization")
    for key in key_table()["removed_zero"]:
        if isinstance(zero, Mapping) and key in zero:
            yield Problem(file.key(f"zero_optimization.{key}"), None, rule, fix)


def _section_problems(
    values: Mapping[str, Any], known: Mapping[str, Any], prefix: str, file: DeepSpeedFile
) -> Iterator[Problem]:
    removed = {"": key_table()["removed"], "zero_optimization.": key_table()["removed_zero"]}.get(prefix, [])
    for name, value in values.items():
        path = prefix + str(name)
        if name in removed:
            continue
        if name not in known:
            yield Problem(file.key(path), _scalar(value), "is not a key DeepSpeed knows", _suggestion(str(name), known))
        elif isinstance(known[name], Mapping):
            if isinstance(value, Mapping):
                below = cast("Mapping[str, Any]", value)
                yield from _section_problems(below, known[name]["keys"], f"{path}.", file)
            elif value is not None:
                yield Problem(file.key(path), _scalar(value), "must be a mapping of keys", "write {...}")
        elif not _fits(value, known[name]):
            noun = NOUNS[known[name]]
            yield Problem(file.key(path), _scalar(value), f"must be {noun}", f"write {noun}, or auto")


def _suggestion(name: str, known: Mapping[str, Any]) -> str:
    close = nearest(name, known)
    if close is not None:
        return f"did you mean {close}?"
    places = _places(key_table()["keys"], "")
    if name in places:
        return f"{name} belongs to {places[name]}"
    close = nearest(name, places)
    return f"did you mean {places[close]}?" if close is not None else "remove it"


def _places(known: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """Return the first dotted path of every key name, nearest to the top first."""
    places = {name: prefix + name for name in known}
    for name, below in known.items():
        if isinstance(below, Mapping):
            nested = cast("Mapping[str, Any]", below)
            places = _places(nested["keys"], f"{prefix}{name}.") | places
    return places


def _fits(value: Any, kind: str) -> bool:
    if kind not in TYPES or value is None or value == "auto":
        return True
    if isinstance(value, bool) and kind != "bool":
        return False
    if kind == "int" and isinstance(value, float) and not value.is_integer():
        return False
    return isinstance(value, TYPES[kind])


def _scalar(value: Any) -> Any:
    return None if isinstance(value, dict | list) else value


def _has(mapping: Any, path: str) -> bool:
    for part in path.split("."):
        if not isinstance(mapping, Mapping) or part not in mapping:
            return False
        mapping = cast("Mapping[str, Any]", mapping)[part]
    return True
