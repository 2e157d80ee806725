"""Base of every section of the recipe: frozen, strict about unknown keys, documented for editors."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
import types
from functools import cache
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

YES_NO = {"yes": True, "on": True, "no": False, "off": False}
NOUNS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def broken_rule(rule: str, fix: str = "", key: str = "") -> PydanticCustomError:
    """Return the error a validator raises: what is wrong, what to do, and which key below the section it is about."""
    return PydanticCustomError("broken_rule", "{rule}", {"rule": rule, "fix": fix, "key": key})


def _describe_fields(schema: dict[str, Any], section: type[BaseModel]) -> None:
    for name, text in descriptions(section).items():
        schema["properties"][name]["description"] = text


class Section(BaseModel):
    """A frozen group of settings. Attribute docstrings become the descriptions of the JSON schema."""

    # Not use_attribute_docstrings: it parses every section's source at import, a seventh of what `trainer check` takes.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra=_describe_fields,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_lookalikes(cls, value: Any, info: ValidationInfo) -> Any:
        return plain_value(value, cls.model_fields[info.field_name or ""].annotation)


@cache
def descriptions(section: type[BaseModel]) -> dict[str, str]:
    """Return the docstring below each field of a section, those of its bases included, in the order of the source."""
    found: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if not issubclass(base, BaseModel) or base is BaseModel:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = inspect.cleandoc(text)
                case _:
                    pass
    return found


def plain_value(value: Any, annotation: Any) -> Any:
    """Return ``value`` ready for ``annotation``; raise where pydantic would quietly convert a lookalike.

    Refused: ``true`` for 1, ``"8"`` for 8, 1 for ``true``, 8 for ``"8"``. Accepted: ``1e3`` for a whole number,
    ``yes``/``no`` for a bool, and an empty section (``resilience:`` with nothing below it), which means its defaults.
    """
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    if value is None:
        wants_section = any(isinstance(option, type) and issubclass(option, Section) for option in options)
        return {} if wants_section and type(None) not in options else None
    if type(value) in options or type(value) not in NOUNS:
        return value
    if float in options and type(value) is int:
        return value
    if int in options and type(value) is float and math.isfinite(value) and value.is_integer():
        return int(value)
    if bool in options and type(value) is str and value.lower() in YES_NO:
        return YES_NO[value.lower()]
    wanted = next((option for option in options if option in NOUNS), None)
    if wanted is not None:
        raise broken_rule(f"must be {NOUNS[wanted]}", _fix(value, wanted))
    return value


def _fix(value: Any, wanted: type) -> str:
    if wanted is str:
        return f'put it in quotes: "{value}"'
    if isinstance(value, str) and wanted is not bool:
        try:
            float(value)
        except ValueError:
            return f"write {NOUNS[wanted]}"
        return "remove the quotes"
    return f"write {NOUNS[wanted]}"
