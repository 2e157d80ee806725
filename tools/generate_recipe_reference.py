"""Write the tables of docs/recipe.md: every key of a recipe with its type, default and meaning, from the schema itself.

Run it after a change of trainer/config/: ``python tools/generate_recipe_reference.py [PAGE]``. It replaces what stands
between the two markers of the page; a test compares the result with the committed page.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer.config.run import Recipe
from trainer.config.section import Section, descriptions

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipe.md"
BEGIN = "<!-- begin: written by tools/generate_recipe_reference.py from trainer/config/, do not edit -->\n"
END = "<!-- end -->\n"
NOUNS: dict[Any, str] = {bool: "true or false", int: "whole number", float: "number", str: "text", dict: "mapping"}
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


@dataclass(frozen=True)
class Row:
    """One key as the table shows it."""

    key: str
    type: str
    default: str
    meaning: str

    def __str__(self) -> str:
        cells = (f"`{self.key}`", self.type, self.default, self.meaning)
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def reference() -> str:
    """Return one chapter a section of the recipe, in the order of the schema."""
    return "\n".join(_chapter(name, field) for name, field in Recipe.model_fields.items())


def updated(page: str) -> str:
    """Return ``page`` with a fresh reference between the markers. Raises ValueError where they are missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks {BEGIN.strip()!r} or {END.strip()!r}")
    return f"{before}{BEGIN}\n{reference()}\n{END}{after}"


def rows(section: type[BaseModel], prefix: str) -> Iterator[Row]:
    """Yield every key below ``prefix``; items of a list are written ``list[].key``."""
    texts = descriptions(section)
    for name, field in section.model_fields.items():
        key = f"{prefix}.{name}"
        yield Row(key, _type(field.annotation, field.metadata), _default(field), _text(texts.get(name, "")))
        for below, mark in _sections(field.annotation):
            yield from rows(below, key + mark)


def _chapter(name: str, field: FieldInfo) -> str:
    section = next(below for below, _ in _sections(field.annotation))
    off = " Null by default: not used." if field.default is None else ""
    lines = [f"## {name}", "", _text(section.__doc__ or "") + off, ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join([*lines, *map(str, rows(section, name)), ""])


def _sections(annotation: Any) -> Iterator[tuple[type[BaseModel], str]]:
    """Yield the sections inside an annotation, with what marks them in a key: "[]" for the items of a list."""
    for option in _options(annotation):
        if isinstance(option, type) and issubclass(option, Section):
            yield option, ""
        elif get_origin(option) is tuple:
            yield from ((below, "[]") for below, _ in _sections(get_args(option)[0]))


def _type(annotation: Any, metadata: list[Any]) -> str:
    words = [_word(option) for option in _options(annotation)]
    limits = [
        f"{sign} {_number(getattr(limit, name))}"
        for limit in metadata
        for name, sign in SIGNS.items()
        if getattr(limit, name, None) is not None
    ]
    counts = [f"at least {limit.min_length}" for limit in metadata if hasattr(limit, "min_length")]
    patterns = [f"`{limit.pattern}`" for limit in metadata if getattr(limit, "pattern", None)]
    words[0] = ", ".join([words[0] + "".join(f" {limit}" for limit in limits[:1]), *limits[1:], *counts, *patterns])
    return " or ".join(words)


def _word(option: Any) -> str:
    if option is types.NoneType:
        return "null"
    if get_origin(option) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(option))
    if get_origin(option) is Annotated:
        inner, *metadata = get_args(option)
        return _type(inner, [limit for field in metadata for limit in getattr(field, "metadata", [])])
    if get_origin(option) is tuple:
        first, *others = get_args(option)
        inner = "sections" if next(_sections(first), None) is not None else _word(first)
        return f"list of {inner}" if others == [...] else f"list of {1 + len(others)}: each {inner}"
    if isinstance(option, type) and issubclass(option, Section):
        return "section"
    return NOUNS[get_origin(option) or option]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its defaults"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _options(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _number(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:g}" if value < 1e5 else str(value)


def _text(docstring: str) -> str:
    return " ".join(docstring.replace("``", "`").split())


if __name__ == "__main__":
    page = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")
