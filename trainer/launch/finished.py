"""Tell a batch script whether its run is done already, before it starts ranks on every node.

``python -m trainer.launch.finished RUN_DIR``: exit code 0 where it is. So a chain or an array of jobs that the run did
not need drains in seconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from trainer.core.done_file import done_path
from trainer.launch.submit import script_of_job


def finished_since_submission(run_directory: Path, environment: Mapping[str, str]) -> bool:
    """Return whether the run has finished since this job was submitted.

    A run that had finished before is asked for more (``run.steps`` was raised): its ranks know. Times are those of
    files in the run directory, so that no clocks are compared.
    """
    script = script_of_job(run_directory, environment.get("SLURM_ARRAY_JOB_ID") or environment.get("SLURM_JOB_ID", ""))
    try:
        return script is not None and done_path(run_directory).stat().st_mtime >= script.stat().st_mtime
    except OSError:
        return False


def main(arguments: list[str]) -> int:
    """Return 0 where the run is done, 3 where it is not, 2 for a wrong call."""
    if len(arguments) != 1:
        print("usage: python -m trainer.launch.finished RUN_DIR", file=sys.stderr)
        return 2
    if not finished_since_submission(Path(arguments[0]), os.environ):
        return 3
    print(f"trainer: {arguments[0]} is done: nothing left for this job", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
