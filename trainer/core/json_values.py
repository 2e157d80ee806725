"""Values out of JSON that others may have written: what is not of the wanted type is None."""

from __future__ import annotations

import math


def whole(value: object) -> int | None:
    """Return an integer; true and false are none."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def number(value: object) -> float | None:
    """Return a finite number; true and false are none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if math.isfinite(value) else None


def text(value: object) -> str | None:
    """Return a string."""
    return value if isinstance(value, str) else None
