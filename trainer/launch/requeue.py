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
from trainer.launch.attempt_facts import JobPlace, newest_step, own_status, say_failed
from trainer.launch.controller import Patience
from trainer.launch.decision import MAXIMUM_WITHOUT_PROGRESS, no_progress, stopped_unsaved
from trainer.launch.excluded_nodes import note_suspects
from trainer.launch.finished import (
    finished_since_submission,
    given_up_since_submission,
    now_by_files,
    script_name,
)
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
    script = script_name(run_directory, os.environ)
    before = restart_record.before(attempts, place.job, place.restart, script)
    if before is not None and _was_stopped_by_person(run_directory, before):
        return _stay_stopped(run_directory, place, before, step)
    lost = before is not None and before.decision == "running"
    if before is not None and lost:
        _note_lost_attempt(run_directory, place, before, step)
    attempt = Attempt(
        job=place.job, restart=place.restart, nodes=place.nodes, started_unix=time.time(), step=step, script=script
    )
    recorded = _record(run_directory, attempt)
    attempts = restart_record.read(run_directory)
    preemptions = restart_record.preemptions_without_progress(attempts, place.job, place.restart, step)
    if preemptions >= MAXIMUM_WITHOUT_PROGRESS:
        _say(f"preempted, or requeued by hand, {preemptions} times in a row without a new checkpoint")
    count = restart_record.restarts_without_progress(attempts, place.job, place.restart, step)
    if (recorded and not lost) or count <= MAXIMUM_WITHOUT_PROGRESS:
        return EXIT_OK
    cause = "the batch script was killed, or its node died" if lost else "not known, since it could not be recorded"
    reason = no_progress(count - 1, step, cause)
    _say(f"job {place.job} not started: {reason}")
    say_failed(run_directory, EXIT_DO_NOT_RESTART, reason, ranks_started=False)
    _record(run_directory, _given_up(run_directory, attempt, reason))
    return EXIT_DO_NOT_RESTART


def _given_up(run_directory: Path, attempt: Attempt, reason: str) -> Attempt:
    return dataclasses.replace(
        attempt, decision="stop", reason=reason, exit_code=EXIT_DO_NOT_RESTART, time_unix=time.time(),
        given_up_unix=now_by_files(run_directory),
    )  # fmt: skip


def _was_stopped_by_person(run_directory: Path, before: Attempt) -> bool:
    """Return whether a person's stop was accepted by a start that could not see to it that the job stays ended."""
    if before.decision in ("stop", "done"):  # settled: who starts the job again has reasons
        return False
    status = own_status(run_directory, JobPlace(job=before.job, restart=before.restart, nodes=""), before.started_unix)
    return status is not None and status.get("requeue") is False and status.get("state") != "finished"


def _stay_stopped(run_directory: Path, place: JobPlace, before: Attempt, step: int) -> int:
    reason = stopped_unsaved(step, "the batch script was killed, or its node died")
    _say(f"job {place.job} not started: {reason}")
    say_failed(run_directory, EXIT_DO_NOT_RESTART, reason, ranks_started=False)
    _record(run_directory, _given_up(run_directory, dataclasses.replace(before, step=step), reason))
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


def _note_lost_attempt(run_directory: Path, place: JobPlace, before: Attempt, step: int) -> None:
    """Note that the attempt before ended without a word, and its nodes that SLURM has lost since."""
    suspects: dict[str, str] = {}
    with contextlib.suppress(SlurmCommandError, ValueError):
        names = expand_hostlist(before.nodes) if before.nodes else []
        suspects = {node.name: f"SLURM says {node.state}" for node in nodes_of(names=names) if node.lost}
    where = f" (node failure: {', '.join(suspects)})" if suspects else ""
    again = "; SLURM has started the job again" if before.job == place.job else ""
    reason = f"the batch script was killed, or its node died{where}{again}"
    _say(f"the attempt before: {reason}")
    with contextlib.suppress(OSError):
        note_suspects(run_directory, suspects, before.job)
        restart_record.write(
            run_directory, dataclasses.replace(before, decision="lost", reason=reason, step=step, time_unix=time.time())
        )


def at_limit(run_directory: Path, place: JobPlace) -> None:
    """Put a job back into the queue that SLURM is ending because of its time limit or a preemption.

    Called as soon as the batch script gets SIGTERM: SIGKILL may come before the ranks have saved, and a job that is
    killed then is gone for good. The newest checkpoint is enough to go on. A job that a person cancelled or stopped
    stays ended. What SLURM does for reasons of its own is noted at once, else it would seem a failure of the run.
    """
    facts = Patience(10.0, _say).ask(lambda: show_job(place.own_id))
    # A preempted job that is RUNNING has its grace time still: a requeue now would cut it short.
    preempted = (facts.preempted and facts.state != "RUNNING") or facts.state == "PREEMPTED"
    back_already = facts.restarts > place.restart
    if not (back_already or preempted or facts.reason == "TimeLimit" or facts.state == "TIMEOUT"):
        return
    step = newest_step(run_directory)
    attempts = restart_record.read(run_directory)
    attempt = restart_record.find(attempts, place.job, place.restart)
    if attempt is not None and _was_stopped_by_person(run_directory, attempt):
        return
    if back_already:
        names = place.hosts()
        if names and any(node.lost for node in nodes_of(names=names)):
            return  # the next start says so, and leaves the nodes out
    else:
        count = restart_record.restarts_without_progress(attempts, place.job, place.restart, step)
        if count >= MAXIMUM_WITHOUT_PROGRESS and not preempted:
            return  # when the ranks have ended in time, this is decided with all that is known
        requeue_job(place.own_id)
        _say(f"job {place.job} is {'preempted' if preempted else 'at its time limit'}: requeued while the ranks save")
    if attempt is not None:
        by_scheduler = back_already or preempted
        why = "preempted, or requeued by hand," if by_scheduler else "at the time limit,"
        noted = dataclasses.replace(
            attempt, decision="scheduler" if by_scheduler else "requeue", reason=f"{why} before the ranks had saved",
            step=step, asked_at_limit=not back_already, time_unix=time.time(),
        )  # fmt: skip
        restart_record.write(run_directory, noted)


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
