"""The batch script's part in a run's life: whether to start, and what to do when the ranks have ended.

``python -m trainer.launch.requeue begin|limit|end RUN_DIR``, called by slurm/train.sbatch inside the job.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

from trainer.core.errors import EXIT_DO_NOT_RESTART, EXIT_OK, EXIT_REFUSED, RefusedError
from trainer.core.hostlist import expand_hostlist
from trainer.core.run_lock import refuse_if_held
from trainer.launch import restart_record
from trainer.launch.attempt_facts import JobPlace, newest_step, say_failed
from trainer.launch.controller import Patience
from trainer.launch.decision import MAXIMUM_WITHOUT_PROGRESS, no_progress
from trainer.launch.excluded_nodes import note_suspects
from trainer.launch.finished import finished_since_submission, given_up_since_submission
from trainer.launch.job_end import JobEnd
from trainer.launch.restart_record import Attempt
from trainer.launch.slurm_commands import SlurmCommandError, nodes_of, requeue_job, show_job

EXIT_NOTHING_TO_DO = 3
"""Of ``begin``: the run has finished, the job may end with 0."""
_ORPHAN_SECONDS = 120.0
"""How long a job that SLURM started again waits for ranks of its former self on a node that could not be reached."""


def begin(run_directory: Path, place: JobPlace) -> int:
    """Mark a new attempt in the log and say whether it has anything to do: 0, or the code to end with.

    Notes how the attempt before ended if it could not say so itself: its batch host died.
    """
    at = time.strftime("%Y-%m-%d %H:%M:%S")
    _say(f"===== job {place.job}, restart {place.restart}, nodes {place.nodes}, {at} =====")
    attempts = restart_record.read(run_directory)
    if finished_since_submission(run_directory, os.environ):
        _say(f"the run in {run_directory} has finished: nothing to do")
        return EXIT_NOTHING_TO_DO
    earlier = given_up_since_submission(run_directory, attempts, os.environ)
    if earlier is not None:
        _say(f"not started: job {earlier.job} gave up ({earlier.reason}) after this one was submitted")
        return EXIT_DO_NOT_RESTART
    try:
        _wait_for_orphans(run_directory, _ORPHAN_SECONDS if place.restart else 0.0)
    except RefusedError as error:
        _say(str(error))
        return EXIT_REFUSED
    step = newest_step(run_directory)
    lost = _note_lost_attempt(run_directory, place, attempts, step)
    attempt = Attempt(job=place.job, restart=place.restart, nodes=place.nodes, started_unix=time.time(), step=step)
    recorded = _record(run_directory, attempt)
    count = restart_record.restarts_without_progress(restart_record.read(run_directory), place.job, place.restart, step)
    if (recorded and not lost) or count <= MAXIMUM_WITHOUT_PROGRESS:
        return EXIT_OK
    cause = "the batch script was killed, or its node died" if lost else "not known, since it could not be recorded"
    reason = no_progress(count - 1, step, cause)
    _say(f"job {place.job} not started: {reason}")
    say_failed(run_directory, EXIT_DO_NOT_RESTART, reason, ranks_started=False)
    ended = dataclasses.replace(
        attempt, decision="stop", reason=reason, exit_code=EXIT_DO_NOT_RESTART, time_unix=time.time()
    )
    _record(run_directory, ended)
    return EXIT_DO_NOT_RESTART


def _record(run_directory: Path, attempt: Attempt) -> bool:
    """Note the attempt, or say that this can't be done."""
    try:
        restart_record.write(run_directory, attempt)
    except OSError as error:
        _say(f"this start can't be recorded ({error}): where that goes on, the job is not started again for ever")
        return False
    return True


def _wait_for_orphans(run_directory: Path, seconds: float) -> None:
    """Raise RefusedError if another process trains in the directory, once it has had ``seconds`` to end."""
    deadline, told = time.monotonic() + seconds, False
    while True:
        try:
            return refuse_if_held(run_directory)
        except RefusedError as error:
            if time.monotonic() >= deadline:
                raise
            if not told:
                _say(f"waiting for up to {seconds:.0f} s: {error}")
                told = True
        time.sleep(1.0)


def _note_lost_attempt(run_directory: Path, place: JobPlace, attempts: list[Attempt], step: int) -> bool:
    """Note that the attempt before ended without a word, if it did, and its nodes that SLURM has lost since."""
    before = restart_record.find(attempts, place.job, place.restart - 1)
    if before is None or before.decision != "running":
        return False
    suspects: dict[str, str] = {}
    with contextlib.suppress(SlurmCommandError, ValueError):
        names = expand_hostlist(before.nodes) if before.nodes else []
        suspects = {node.name: f"SLURM says {node.state}" for node in nodes_of(names=names) if node.lost}
    where = f" (node failure: {', '.join(suspects)})" if suspects else ""
    reason = f"the batch script was killed, or its node died{where}; SLURM has started the job again"
    _say(f"the attempt before: {reason}")
    with contextlib.suppress(OSError):
        note_suspects(run_directory, suspects, place.job)
        restart_record.write(
            run_directory, dataclasses.replace(before, decision="lost", reason=reason, step=step, time_unix=time.time())
        )
    return True


def at_limit(run_directory: Path, place: JobPlace) -> None:
    """Put a job back into the queue that SLURM is ending because of its time limit or a preemption.

    Called as soon as the batch script gets SIGTERM: SIGKILL may come before the ranks have saved, and a job that is
    killed then is gone for good. The newest checkpoint is enough to go on. A job that a person cancelled stays ended.
    """
    facts = Patience(10.0, _say).ask(lambda: show_job(place.own_id))
    # A preempted job that is RUNNING has its grace time still: a requeue now would cut it short.
    preempted = facts.preempted and facts.state != "RUNNING"
    by_slurm = facts.reason == "TimeLimit" or facts.state in ("TIMEOUT", "PREEMPTED") or preempted
    if not by_slurm or facts.restarts > place.restart:
        return
    step = newest_step(run_directory)
    attempts = restart_record.read(run_directory)
    if restart_record.restarts_without_progress(attempts, place.job, place.restart, step) >= MAXIMUM_WITHOUT_PROGRESS:
        return  # when the ranks have ended in time, this is decided with all that is known
    requeue_job(place.own_id)
    _say(f"job {place.job} is at its time limit or preempted: requeued while the ranks save")
    attempt = restart_record.find(attempts, place.job, place.restart)
    if attempt is not None:
        why = "at the time limit, or preempted, before the ranks had saved"
        restart_record.write(
            run_directory,
            dataclasses.replace(
                attempt, decision="requeue", reason=why, step=step, asked_at_limit=True, time_unix=time.time()
            ),
        )


def main(arguments: list[str] | None = None) -> int:
    """Run one of the three; the exit code is what the batch script acts on."""
    parser = argparse.ArgumentParser(prog="python -m trainer.launch.requeue", description=__doc__)
    parser.add_argument("moment", choices=("begin", "limit", "end"))
    parser.add_argument("run_directory", type=Path)
    parser.add_argument("--code", type=int, default=0, help="exit code of what started the ranks")
    parser.add_argument("--before-start", action="store_true", help="the ranks were not started")
    parser.add_argument("--cause", help="what failed before they were")
    parser.add_argument("--max-restarts", type=int, default=100)
    parser.add_argument("--max-excluded-nodes", type=int, default=2)
    parser.add_argument("--exclude", default="", help="host list that the user leaves out")
    parser.add_argument("--controller-seconds", type=float, default=600.0)
    options = parser.parse_args(arguments)
    # SLURM's answer to a requeue is SIGTERM to the whole job: this, and the commands it calls, must outlive it.
    # USR1 and USR2 (scancel --full) are for the batch script.
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    place = JobPlace.here(os.environ)
    if options.moment == "begin":
        return begin(options.run_directory, place)
    if options.moment == "limit":
        with contextlib.suppress(SlurmCommandError, OSError):
            at_limit(options.run_directory, place)
        return EXIT_OK
    end = JobEnd(
        options.run_directory,
        place,
        max_restarts=options.max_restarts,
        max_excluded_nodes=options.max_excluded_nodes,
        exclude=options.exclude,
        patience=Patience(options.controller_seconds, _say),
        say=_say,
    )
    return end.settle(options.code, started=not options.before_start, cause=options.cause)


def _say(text: str) -> None:
    print(f"trainer: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
