"""Which rows and texts of a corpus are taken."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.core.errors import DataError, Problem

_CONDITION = re.compile(r"^\s*([^=!<>]+?)\s*(!=|>=|<=|=)(.*)$", re.DOTALL)
_MISSING = object()


@dataclass(frozen=True)
class Where:
    """One condition on a key of a row."""

    key: str
    operator: str
    value: str

    @staticmethod
    def parse(text: str) -> Where:
        """Read ``KEY=VALUE``, ``KEY!=VALUE``, ``KEY>=NUMBER`` or ``KEY<=NUMBER``. Raises DataError."""
        match = _CONDITION.match(text)
        fix = "write KEY=VALUE, KEY!=VALUE, KEY>=NUMBER or KEY<=NUMBER"
        if match is None:
            raise DataError(Problem("where", text, "isn't a condition", fix), title="input")
        where = Where(match[1], match[2], match[3].strip())
        if where.operator in (">=", "<=") and _number(where.value) is None:
            raise DataError(Problem("where", text, "must compare with a number", fix), title="input")
        return where

    @property
    def column(self) -> str:
        """First part of the key: the column of a table."""
        return self.key.split(".", 1)[0]

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Return whether the row has the key and its value fits."""
        found = _look_up(row, self.key)
        if found is _MISSING:
            return False
        if self.operator in ("=", "!="):
            return _equal(found, self.value) == (self.operator == "=")
        number, limit = _number(found), _number(self.value)
        if number is None or limit is None:
            return False
        return number >= limit if self.operator == ">=" else number <= limit


@dataclass(frozen=True)
class Filters:
    """What a document must satisfy."""

    where: tuple[Where, ...] = ()
    min_characters: int | None = None
    max_characters: int | None = None

    @staticmethod
    def parse(where: Sequence[str], min_characters: int | None, max_characters: int | None) -> Filters:
        """Read the options of the command line. Raises DataError with every problem."""
        problems: list[Problem] = []
        conditions: list[Where] = []
        for text in where:
            try:
                conditions.append(Where.parse(text))
            except DataError as error:
                problems += error.problems
        for name, value in (("min-characters", min_characters), ("max-characters", max_characters)):
            if value is not None and value < 1:
                problems.append(Problem(name, value, "must be at least 1"))
        if min_characters is not None and max_characters is not None and min_characters > max_characters:
            problems.append(Problem("max-characters", max_characters, f"must be at least {min_characters}"))
        if problems:
            raise DataError(problems, title="input")
        return Filters(tuple(conditions), min_characters, max_characters)

    @property
    def active(self) -> bool:
        """Whether anything can be dropped."""
        return bool(self.where) or self.min_characters is not None or self.max_characters is not None

    def row_test(self) -> Callable[[Mapping[str, Any]], bool] | None:
        """Return the test of a row, None if all pass."""
        if not self.where:
            return None
        return lambda row: all(where.holds(row) for where in self.where)


def unescape(text: str) -> str:
    r"""Return ``text`` with the escapes \\n, \\t, \\r, \\0, \\\\, \\xNN, \\uNNNN of Python read. Raises DataError."""
    simple = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0", "\\": "\\"}

    def read(match: re.Match[str]) -> str:
        body = match[1]
        if body in simple:
            return simple[body]
        if len(body) > 1:
            return chr(int(body[1:], 16))
        raise DataError(Problem("separator", text, f"has an unknown escape \\{body}"), title="input")

    return re.sub(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|.|$)", read, text, flags=re.DOTALL)


def _look_up(row: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key, or of a path through nested objects (``meta.language``)."""
    if key in row:
        return row[key]
    head, dot, rest = key.partition(".")
    inner = row.get(head) if dot else None
    return _look_up(inner, rest) if isinstance(inner, Mapping) else _MISSING


def _equal(found: Any, value: str) -> bool:
    if isinstance(found, str):
        return found == value
    if found is None or isinstance(found, bool):
        return value == {None: "null", True: "true", False: "false"}[found]
    if isinstance(found, (int, float)):
        return float(found) == _number(value)
    return str(found) == value


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
