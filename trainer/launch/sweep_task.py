"""Be one rank of the task of a sweep that this array job is.

``python -m trainer.launch.sweep_task SWEEP_DIR``: `trainer train` with the overrides of the task.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from trainer.core.errors import RefusedError
from trainer.launch.sweep_file import read_sweep


def train_command(directory: Path, environment: Mapping[str, str]) -> list[str]:
    """Return the words after ``python`` that train this task. Raises RefusedError where it is none."""
    sweep = read_sweep(directory)
    number = environment.get("SLURM_ARRAY_TASK_ID", "")
    task = next((each for each in sweep.tasks if str(each.number) == number), None) if sweep else None
    if sweep is None or task is None:
        raise RefusedError(f"{directory}: no task {number!r} of a sweep → submit it by `trainer submit --sweep`")
    return ["-m", "trainer", "train", sweep.recipe, *sweep.overrides, *task.overrides(directory)]


if __name__ == "__main__":
    try:
        words = train_command(Path(sys.argv[1]), os.environ)
    except RefusedError as error:
        print(f"trainer: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    os.execv(sys.executable, [sys.executable, *words])
