"""How checkpoints are shown: lines of text for a terminal, objects for programs."""

from __future__ import annotations

from typing import Any

from trainer.checkpoint.survey import Held, Survey, shape_text
from trainer.core.run_lock import holder
from trainer.core.units import format_bytes, format_duration


def survey_lines(found: Survey, now_unix: float) -> list[str]:
    """Return a table of a run's checkpoints and what else is there."""
    rows = [("step", "size", "ranks", "dtype", "age", "kind", "state")]
    notes: list[list[str]] = [[]]
    for held in found.checkpoints:
        age = format_duration(now_unix - held.created_unix) if held.created_unix is not None else "?"
        kind = "best" if held.best else "milestone" if held.milestone else "rolling"
        latest = ", latest" if held.step == found.pointed else ""
        shape = shape_text(held.world_size, held.topology)
        row = (str(held.step), format_bytes(held.num_bytes), shape, held.dtype or "?", age, kind)
        rows.append((*row, _state(held) + latest))
        notes.append(list(held.problems))
    lines: list[str] = []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row, said in zip(rows, notes, strict=True):
        cells = [cell.rjust(width) if column < 2 else cell.ljust(width)
                 for column, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
        lines += [" " * (widths[0] + 2) + problem for problem in said]
    if found.pointer_problem:
        lines.append(found.pointer_problem)
    busy = bool(found.interrupted) and holder(found.run_directory, watch=False) is not None
    what = "being written or deleted" if busy else "left by an interrupted save or deletion"
    lines += [f"{path.name}: {what}" for path in found.interrupted]
    if found.damaged:
        lines.append(f"damaged/: {len(found.damaged)} moved aside by an earlier repair")
    return lines


def survey_object(found: Survey) -> dict[str, Any]:
    """Return the same as one object."""
    return {
        "checkpoints": [
            {
                "step": held.step,
                "directory": str(held.directory),
                "bytes": held.num_bytes,
                "world_size": held.world_size,
                "topology": held.topology,
                "dtype": held.dtype,
                "created_unix": held.created_unix,
                "milestone": held.milestone,
                "best": held.best,
                "complete": held.complete,
                "newer": held.newer,
                "problems": list(held.problems),
                "latest": held.step == found.pointed,
            }
            for held in found.checkpoints
        ],
        "latest": found.pointed,
        "latest_problem": found.pointer_problem,
        "interrupted": [path.name for path in found.interrupted],
        "damaged": [path.name for path in found.damaged],
    }


def _state(held: Held) -> str:
    if held.newer:
        return "of a newer version"
    return "complete" if held.complete else "damaged"
