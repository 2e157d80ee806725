"""Base of every section of the recipe: frozen, strict about unknown keys, documented for editors."""

from __future__ import annotations

import math
import types
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

YES_NO = {"yes": True, "on": True, "no": False, "off": False}
NOUNS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def broken_rule(rule: str, fix: str = "", key: str = "") -> PydanticCustomError:
    """Return the error a validator raises: what is wrong, what to do, and which key below the section it is about."""
    return PydanticCustomError("broken_rule", "{rule}", {"rule": rule, "fix": fix, "key": key})


class Section(BaseModel):
    """A frozen group of settings. Attribute docstrings become the descriptions of the JSON schema."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_lookalikes(cls, value: Any, info: ValidationInfo) -> Any:
        return plain_value(value, cls.model_fields[info.field_name or ""].annotation)


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
