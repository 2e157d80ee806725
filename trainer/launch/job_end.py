"""The end of one attempt of a SLURM job: gather what is known, decide, requeue, leave out nodes, write it all down."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from trainer.core.done_file import read_done
from trainer.core.errors import EXIT_DO_NOT_RESTART, EXIT_OK
from trainer.core.failure_file import read_failure
from trainer.core.hostlist import expand_hostlist
from trainer.launch import excluded_nodes, restart_record
from trainer.launch.attempt_facts import JobPlace, newest_step, own_status, say_failed
from trainer.launch.controller import Patience
from trainer.launch.decision import Decision, Facts, decide
from trainer.launch.failure import newest_launch, summarise_launch
from trainer.launch.finished import now_by_files
from trainer.launch.restart_record import Attempt
from trainer.launch.slurm_commands import (
    JobFacts,
    Node,
    SlurmCommandError,
    cancel_jobs,
    exclude_nodes,
    nodes_of,
    requeue_job,
    show_job,
)
from trainer.telemetry.run_report import collect_report, describe_report

_CLOCK_SLACK_SECONDS = 5.0


class JobEnd:
    """Settles what becomes of the job in which it runs."""

    def __init__(
        self,
        run_directory: Path,
        place: JobPlace,
        *,
        max_restarts: int,
        max_excluded_nodes: int,
        patience: Patience,
        say: Callable[[str], None],
        exclude: str = "",
    ) -> None:
        self.run_directory, self.place = run_directory, place
        self.max_restarts, self.max_excluded_nodes = max_restarts, max_excluded_nodes
        self.patience, self.say, self.exclude = patience, say, exclude
        self.unreachable = ""
        """Why the controller could not be asked."""

    def settle(self, code: int, *, started: bool = True, cause: str | None = None) -> int:
        """Do what is to be done after the starter ended with ``code``; return the exit code of the batch script.

        ``started`` is False where the ranks were not started: because of ``cause``, or because they were not to be.
        """
        attempts = restart_record.read(self.run_directory)
        attempt = restart_record.find(attempts, self.place.job, self.place.restart)
        attempt = attempt or Attempt(
            job=self.place.job, restart=self.place.restart, nodes=self.place.nodes, started_unix=time.time()
        )
        status = own_status(self.run_directory, self.place, attempt.started_unix) if started else None
        failure = self._failure(attempt.started_unix) if started else {}
        facts = self._facts(code, attempts, status, failure)
        facts = dataclasses.replace(facts, started=started, cause=cause or facts.cause)
        # Would it go on if SLURM had preempted it? Else SLURM need not be asked.
        decision, job, lost = decide(dataclasses.replace(facts, preempted=True)), None, list[Node]()
        if decision.restart:
            job, lost = self._ask_slurm()
            facts = dataclasses.replace(
                facts,
                job_state=job.state if job else None,
                job_reason=job.reason if job else "",
                preempted=job is not None and job.preempted,
                back_already=job is not None and job.restarts > self.place.restart,
                lost_nodes=tuple(node.name for node in lost),
            )
            decision = decide(facts)
        if decision.restart and job is None:
            decision = self._not_requeued(decision)
        suspects = {node.name: f"SLURM says {node.state}" for node in lost}
        suspects |= dict.fromkeys(self._own_hosts(failure.get("suspect_hosts")), facts.cause or "failed")
        self._note(attempt, decision, facts, status)
        with contextlib.suppress(OSError):
            excluded_nodes.note_suspects(self.run_directory, suspects, self.place.job)
        if decision.restart:
            try:
                self.patience.ask(lambda: requeue_job(self.place.own_id))
            except SlurmCommandError as error:
                self.unreachable = str(error)
                decision = self._not_requeued(decision)
                self._note(attempt, decision, facts, status)
        if job is not None and (decision.restart or facts.back_already):
            self._leave_out_nodes(job)
        self._tell(decision)
        if decision.name in ("done", "stop"):
            self._report()
        if decision.name == "stop":
            self._stay_ended(job, attempt)
        return decision.exit_code

    def _stay_ended(self, job: JobFacts | None, attempt: Attempt) -> None:
        """Take the job out of the queue if SLURM is to start it again: asked at the time limit, or by itself."""
        if self.unreachable:  # that is why it stops; what it asked for at the time limit holds
            return
        try:
            if job is None:
                job = Patience(10.0, self.say).ask(lambda: show_job(self.place.own_id))
            if attempt.asked_at_limit or job.restarts > self.place.restart:
                self.patience.ask(lambda: cancel_jobs([self.place.own_id]))
                self.say(f"job {self.place.job} cancelled: SLURM was about to start it again")
        except SlurmCommandError as error:
            self.say(f"SLURM can't be asked whether it starts the job again: {error}")

    def _failure(self, since_unix: float) -> dict[str, Any]:
        """Return what the ranks' supervisors say of this attempt; now, when the reports of all that live are there."""
        since = since_unix - _CLOCK_SLACK_SECONDS
        launch = newest_launch(self.run_directory, since)
        if launch is not None and self._is_own(launch):
            with contextlib.suppress(OSError):
                found = summarise_launch(self.run_directory, launch, self.place.hosts_of_ranks())
                if found is not None:
                    return found
        written = read_failure(self.run_directory) or {}  # by the check of the nodes, for one
        at = written.get("time_unix")
        recent = isinstance(at, int | float) and at >= since
        return written if recent and self._is_own(str(written.get("launch", ""))) else {}

    def _is_own(self, launch: str) -> bool:
        # A launch of srun is named after job and restart; others are recognised by their time alone.
        return not launch.startswith("slurm-") or launch.startswith(f"slurm-{self.place.job}-{self.place.restart}-")

    def _ask_slurm(self) -> tuple[JobFacts | None, list[Node]]:
        """Return what the controller says of the job, and which of its nodes it has lost."""
        try:
            job = self.patience.ask(lambda: show_job(self.place.own_id))
            names = self.place.hosts()
            return job, [node for node in nodes_of(names=names) if node.lost] if names else []
        except SlurmCommandError as error:
            self.unreachable = str(error)
            return None, []

    def _facts(
        self, code: int, attempts: list[Attempt], status: dict[str, Any] | None, failure: dict[str, Any]
    ) -> Facts:
        """Return what the run directory says; a job that runs, as far as SLURM is concerned."""
        said = status or {}
        ended, status_code = said.get("state") in ("finished", "stopped", "failed"), said.get("exit_code")
        step = newest_step(self.run_directory)
        key = (self.place.job, self.place.restart)
        done = read_done(self.run_directory)
        own_done = done is not None and done.attempt == said.get("attempt")
        reason = said.get("reason") if said.get("state") == "failed" else None
        cause = failure.get("cause") or reason
        wants = said.get("requeue")
        return Facts(
            code=code,
            finished=(ended and status_code == 0) or own_done or (code == EXIT_OK and status is None),
            status_code=status_code if ended and isinstance(status_code, int) else None,
            wants_requeue=wants if isinstance(wants, bool) else None,
            cause=str(cause).splitlines()[0] if cause else None,
            retryable=failure.get("retryable") is not False,
            step=step,
            job_state="RUNNING",
            without_progress=restart_record.restarts_without_progress(attempts, *key, step),
            retries=restart_record.retries(attempts, *key),
            max_restarts=self.max_restarts,
        )

    def _not_requeued(self, decision: Decision) -> Decision:
        by_hand = f"by hand: scontrol requeue {self.place.own_id}, or trainer submit as before"
        return Decision(
            "stop", f"{decision.reason}; SLURM can't be asked ({self.unreachable}); {by_hand}", decision.exit_code
        )

    def _note(self, attempt: Attempt, decision: Decision, facts: Facts, status: dict[str, Any] | None) -> None:
        """Write the decision into restarts.json, and into status.json where the run could not say how it ended."""
        own = (status or {}).get("attempt")
        name = decision.name
        if name == "scheduler" and attempt.decision == "requeue":  # asked for at the time limit, while the ranks saved
            name = "requeue"
        elif decision.restart and not facts.lost_nodes and (facts.preempted or attempt.decision == "scheduler"):
            name = "scheduler"  # a preemption says nothing of the run
        entry = dataclasses.replace(
            attempt, attempt=own if type(own) is int else None, step=facts.step, decision=name,
            reason=decision.reason, exit_code=decision.exit_code, time_unix=time.time(),
            given_up_unix=now_by_files(self.run_directory) if decision.final else 0.0,
        )  # fmt: skip
        with contextlib.suppress(OSError):
            restart_record.write(self.run_directory, entry)
        given_up = (
            decision.name == "stop"
            and decision.exit_code == EXIT_DO_NOT_RESTART
            and facts.status_code != EXIT_DO_NOT_RESTART
        )
        silent = status is not None and facts.status_code is None and not facts.finished
        if given_up or silent:
            started = status is not None
            say_failed(self.run_directory, decision.exit_code, decision.reason, ranks_started=started)

    def _leave_out_nodes(self, job: JobFacts) -> None:
        """Let the job, which is in the queue again, avoid nodes that the run failed on."""
        noted = {node.host for node in excluded_nodes.read(self.run_directory)}
        if not noted:
            return
        active = excluded_nodes.excluded_now(self.run_directory, self.max_excluded_nodes)
        try:
            before = expand_hostlist(job.excluded) if job.excluded else []
            users = expand_hostlist(self.exclude) if self.exclude else []
            own = list(dict.fromkeys([*users, *(host for host in before if host not in noted)]))
            room = excluded_nodes.that_leave_room(active, job, own, nodes_of(partition=job.partition or None))
            wanted = excluded_nodes.merged(own, room)
            if set(wanted) != set(before):
                self.patience.ask(lambda: exclude_nodes(self.place.own_id, wanted))
        except (SlurmCommandError, ValueError) as error:
            self.say(f"no node is left out of the next attempt: {error}")
            return
        if room:
            self.say(f"left out of the next attempt: {', '.join(room)}")
        if len(room) < len(active):
            rest = ", ".join(host for host in active if host not in room)
            bound = "the job has a reservation or names its nodes"
            self.say(f"not left out, since {bound if job.bound else 'too few nodes would remain for the job'}: {rest}")

    def _tell(self, decision: Decision) -> None:
        words = {
            "done": "done", "requeue": "requeued", "retry": "requeued after a failure",
            "scheduler": "not requeued by itself", "stop": "not requeued",
        }  # fmt: skip
        self.say(f"job {self.place.job} {words[decision.name]}: {decision.reason}")

    def _report(self) -> None:
        """Tell what became of the run, and where its time went."""
        with contextlib.suppress(OSError, ValueError):
            found = collect_report(self.run_directory)
            if found.goodput is not None:
                self.say("\n".join(["end of the run", *describe_report(found)]))

    def _own_hosts(self, hosts: object) -> list[str]:
        """Return the nodes of this job among the host names of a failure report: SLURM knows them by the first part."""
        given = cast("list[object]", hosts) if isinstance(hosts, list) else []
        named = {str(host).split(".")[0] for host in given}
        return [host for host in self.place.hosts() if host in named]
