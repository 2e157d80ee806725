"""Put the SLURM job that this runs in back into the queue, if the run saved and wants to go on.

``python -m trainer.launch.requeue RUN_DIR --since UNIX_SECONDS``: the last line of slurm/train.sbatch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from trainer.core.errors import EXIT_REQUEUE
from trainer.core.status_file import read_status
from trainer.launch.slurm_commands import SlurmCommandError, requeue_job, show_state

MAXIMUM_RESTARTS = 100
"""A bound on what a run that never advances may burn; a long run at 24 h a job ends far below it."""
_CLOCK_SLACK_SECONDS = 5


def reason_not_to_requeue(run_directory: Path, since_unix: float, environment: Mapping[str, str]) -> str | None:
    """Return why the job must not go back into the queue, None where it should.

    status.json is the authority on how the run ended, if it was written by this attempt (``since_unix``): one left by
    an earlier attempt would requeue a job that fails at start, for ever.
    """
    status = read_status(run_directory)
    if status is None:
        return "the run left no status.json"
    if status.get("state") != "stopped" or status.get("exit_code") != EXIT_REQUEUE:
        return f"the run ended with state {status.get('state')}, exit code {status.get('exit_code')}"
    updated = status.get("updated_unix")
    if not isinstance(updated, int | float) or updated < since_unix - _CLOCK_SLACK_SECONDS:
        return "status.json was not written by this attempt"
    restarts = environment.get("SLURM_RESTART_COUNT", "0")
    if not restarts.isdecimal() or int(restarts) >= MAXIMUM_RESTARTS:
        return f"it has been restarted {restarts} times (at most {MAXIMUM_RESTARTS})"
    return None


def main(arguments: list[str] | None = None) -> int:
    """Requeue or say why not. Returns 0 when the job is back in the queue, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m trainer.launch.requeue", description=__doc__)
    parser.add_argument("run_directory", type=Path)
    parser.add_argument("--since", type=float, required=True, help="start of this attempt, seconds since 1970")
    options = parser.parse_args(arguments)
    job_id = os.environ.get("SLURM_JOB_ID", "")
    why_not = reason_not_to_requeue(options.run_directory, options.since, os.environ)
    try:
        if why_not is None:
            state, reason = show_state(job_id)
            # scancel leaves the job COMPLETING without a reason; requeueing it would bring back what a person ended.
            if state != "RUNNING" and reason != "TimeLimit":
                why_not = f"it is {state}: cancelled"
        if why_not is None:
            requeue_job(job_id)
    except SlurmCommandError as error:
        why_not = str(error)
    print(f"trainer: job {job_id} {'requeued' if why_not is None else f'not requeued: {why_not}'}", file=sys.stderr)
    return 0 if why_not is None else 1


if __name__ == "__main__":
    sys.exit(main())
