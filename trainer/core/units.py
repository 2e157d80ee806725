"""Numbers as people read them."""

from __future__ import annotations

import math


def format_count(count: float) -> str:
    """Return three significant digits with k, M, B or T: 950, 12.3k, 1.50M, 7.24B."""
    return _scaled(count, 1000, ("", "k", "M", "B", "T"))


def format_bytes(count: float) -> str:
    """Return binary units: 512 B, 1.50 KiB, 79.6 GiB."""
    return _scaled(count, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def format_duration(seconds: float | None) -> str:
    """Return two units at most: 0s, 0.35s, 9.5s, 42s, 1m 02s, 3h 07m, 2d 04h; ``?`` where unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    if seconds < 0:
        return f"-{format_duration(-seconds)}"
    if 0 < seconds < 9.95:
        return f"{seconds:.2f}s" if seconds < 0.995 else f"{seconds:.1f}s"
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m {total % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d {hours % 24:02d}h"


def _scaled(value: float, base: int, suffixes: tuple[str, ...]) -> str:
    if not math.isfinite(value):
        return "?"
    index = 0
    while abs(value) >= base - 0.5 and index + 1 < len(suffixes):
        value /= base
        index += 1
    whole = index == 0 and float(value).is_integer()
    digits = 0 if whole or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}{suffixes[index]}"
