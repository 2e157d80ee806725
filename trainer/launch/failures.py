"""What the ranks' supervisors wrote down about the failure of an attempt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from trainer.launch.attempt_facts import JobPlace


def failure_of(run_directory: Path, place: JobPlace, since_unix: float) -> dict[str, Any]:
    """Return the fields of RUN/failure.json if it is of this attempt, else none."""
    try:
        content: object = json.loads((run_directory / "failure.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    fields = cast("dict[str, Any]", content)
    launch, at = str(fields.get("launch", "")), fields.get("time_unix")
    if launch.startswith("slurm-"):  # named after job, restart and step: no clocks are compared
        return fields if launch.startswith(f"slurm-{place.job}-{place.restart}-") else {}
    return fields if isinstance(at, int | float) and at >= since_unix else {}
