"""Read and write the YAML dialect of recipes: strict, small, and without YAML 1.1's surprises."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar, cast

import yaml

MAXIMUM_DEPTH = 32
MAXIMUM_NODES = 100_000  # after aliases are expanded, so that ten nested anchors can't fill the memory
STRING, INT, FLOAT, BOOL, NULL = (f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null"))

# YAML 1.2's scalars. 1.1, PyYAML's default, reads 3e-4 as text, 24:00:00 as 86400, 012 as 10 and no as false.
RESOLVERS = (
    (INT, re.compile(r"^[-+]?[0-9][0-9_]*$"), "-+0123456789"),
    (
        FLOAT,
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        "-+0123456789.",
    ),
    (BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    (NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
)


class YamlTextError(Exception):
    """The text is not acceptable YAML; the message says where and why, for the user."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise YamlTextError(f"line {line}: a key must be text")
            key = cast(str, key_node.value)
            if key in seen:
                raise YamlTextError(f"line {line}: the key {key!r} is given twice in the same mapping")
            seen.add(key)
        return super().construct_mapping(node, deep=True)


class _Dumper(yaml.SafeDumper):
    # The 1.1 resolvers stay as well: text that either version would misread is quoted.
    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: _Dumper, value: str) -> Any:
    # Other line breaks than \n are lost in every style but the one that escapes them.
    style = '"' if any(mark in value for mark in "\r\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar(STRING, value, style=style)  # pyright: ignore[reportUnknownMemberType]


def _number(loader: _Loader, node: Any) -> int | float:
    text = str(loader.construct_scalar(node)).replace("_", "")
    if node.tag == INT:
        return int(text)
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


for _tag, _pattern, _first in RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, _pattern, list(_first))  # pyright: ignore[reportUnknownMemberType]
_Dumper.add_representer(str, _text)
_Loader.add_constructor(INT, _number)
_Loader.add_constructor(FLOAT, _number)


def parse_yaml(text: str) -> Any:
    """Return the value of the one YAML document in ``text``.

    Raises:
        YamlTextError: syntax error, duplicate key, tag, too deep (32 levels) or too large (100,000 values).
    """
    try:
        depth = 0
        for event in cast("Iterator[Any]", yaml.parse(text, Loader=_Loader)):  # pyright: ignore[reportUnknownMemberType]
            opens = isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent)
            closes = isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent)
            depth += opens - closes
            if depth > MAXIMUM_DEPTH:
                raise YamlTextError(f"nested more than {MAXIMUM_DEPTH} levels deep")
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise YamlTextError(_one_line(error)) from None
    except (ValueError, RecursionError) as error:
        raise YamlTextError(str(error)) from None
    _count(value, 0, [0])
    return value


def dump_yaml(value: Any) -> str:
    """Return ``value`` (dicts, lists, scalars) as YAML that ``parse_yaml`` reads back to an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _count(value: Any, depth: int, total: list[int]) -> None:
    total[0] += 1
    if depth > MAXIMUM_DEPTH:
        raise YamlTextError(f"nested more than {MAXIMUM_DEPTH} levels deep")
    if total[0] > MAXIMUM_NODES:
        raise YamlTextError(f"more than {MAXIMUM_NODES} values")
    children: list[Any] = []
    if isinstance(value, dict):
        children = list(cast("dict[Any, Any]", value).values())
    elif isinstance(value, list):
        children = cast("list[Any]", value)
    for child in children:
        _count(child, depth + 1, total)


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    context = getattr(error, "context", None)
    return place + problem + (f" ({context})" if context else "")
