"""What becomes of a SLURM job whose ranks have ended. Pure: facts in, one decision out."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.core.errors import EXIT_DO_NOT_RESTART, EXIT_FAILURE, EXIT_OK, EXIT_REFUSED, EXIT_REQUEUE
from trainer.launch.restart_record import DecisionName

MAXIMUM_WITHOUT_PROGRESS = 3
"""Automatic restarts in a row without a new checkpoint, after which another one would be a waste."""
_STOPPED = "a person asked the run to stop"
_ENDED_BY_SLURM = ("TIMEOUT", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL")
"""States of a job that SLURM ended for reasons of its own: it may go on."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known when the ranks have ended."""

    code: int
    """Exit code of what started the ranks."""
    finished: bool
    """Whether the run says that it has finished, by RUN/DONE or status.json."""
    status_code: int | None
    """Exit code that status.json gives, where this attempt wrote it and said one."""
    wants_requeue: bool | None
    """``requeue`` of status.json; None: not said."""
    started: bool = True
    """False: the ranks were not started."""
    cause: str | None
    """One sentence of failure.json, or of status.json."""
    retryable: bool
    """False where failure.json says that another start would fail alike."""
    step: int
    """Newest committed checkpoint."""
    job_state: str | None
    """As the controller says it; None: it can't be reached."""
    job_reason: str = ""
    preempted: bool = False
    back_already: bool = False
    """SLURM has already put the job back into the queue."""
    lost_nodes: tuple[str, ...] = ()
    """Nodes of the job that are down, or don't answer the controller."""
    without_progress: int
    """Automatic restarts in a row before this one without a checkpoint beyond ``step``."""
    retries: int
    """Failures before this one after which the job started again."""
    max_restarts: int


@dataclass(frozen=True)
class Decision:
    """What to do, and the exit code of the batch script."""

    name: DecisionName
    reason: str
    exit_code: int
    final: bool = False
    """No other job is to start in its place: a person wants it so, or it would end the same way."""

    @property
    def restart(self) -> bool:
        """Whether the job is to be put back into the queue."""
        return self.name in ("requeue", "retry")


def decide(facts: Facts) -> Decision:
    """Return what becomes of the job."""
    if facts.finished:
        return Decision("done", "the run has finished", EXIT_OK)
    code, cause = end_code(facts), _cause(facts)
    stuck = facts.without_progress >= MAXIMUM_WITHOUT_PROGRESS and not facts.preempted
    if facts.back_already and not (stuck and facts.lost_nodes):
        return Decision(*_scheduler(facts), code)
    if code in (EXIT_REFUSED, EXIT_DO_NOT_RESTART):
        return Decision("stop", cause, code, final=code == EXIT_DO_NOT_RESTART)
    if facts.wants_requeue is False:
        saved = code == EXIT_REQUEUE
        why = f"{_STOPPED}, saved at step {facts.step}" if saved else stopped_unsaved(facts.step, cause)
        return Decision("stop", why, code, final=True)
    if _cancelled(facts):
        return Decision("stop", f"the job is {facts.job_state}: cancelled", code)
    saved = code == EXIT_REQUEUE
    if not saved and not facts.retryable:
        return Decision("stop", f"{cause}; another start would fail the same way", code, final=True)
    if stuck:
        reason = no_progress(facts.without_progress, facts.step, cause)
        return Decision("stop", reason, EXIT_DO_NOT_RESTART, final=True)
    if not saved and facts.retries >= facts.max_restarts and not facts.preempted:
        limit = f"started again after {facts.retries} failures already (launch.slurm.max_restarts)"
        return Decision("stop", f"{cause}; {limit}", code)
    if not saved:
        return Decision("retry", cause, code)
    why = f"saved at step {facts.step}" if facts.started else "asked to stop before the ranks were started"
    return Decision("requeue", why, code)


def stopped_unsaved(step: int, cause: str) -> str:
    """Return why a job stays ended whose last save, which a person asked for, may be missing."""
    return f"{_STOPPED}, and it did not end as asked ({cause}); the newest checkpoint is of step {step}"


def no_progress(restarts: int, step: int, cause: str) -> str:
    """Return why a job that restarts without getting anywhere is stopped."""
    return (
        f"{restarts} restarts in a row without a new checkpoint (the newest is "
        f"{f'step {step}' if step else 'none'}); the last end: {cause}. Mend the cause and submit again"
    )


def end_code(facts: Facts) -> int:
    """Return the exit code of the run: status.json's word, else that of the starter where it is one of ours."""
    code = facts.status_code if facts.status_code is not None else facts.code
    # A starter that could not start a rank, or was killed: 126, 137, 143...
    return code if code in (EXIT_REFUSED, EXIT_REQUEUE, EXIT_DO_NOT_RESTART) else EXIT_FAILURE


def _cancelled(facts: Facts) -> bool:
    # While a cancelled job ends it is COMPLETING without a reason. If the controller can't be reached, nothing is known
    # of it: the request to requeue will wait for the controller.
    running = facts.job_state in (None, "RUNNING", "SUSPENDED", "SIGNALING", "STAGE_OUT", *_ENDED_BY_SLURM)
    return not running and facts.job_reason != "TimeLimit" and not facts.preempted


def _scheduler(facts: Facts) -> tuple[DecisionName, str]:
    if facts.lost_nodes:
        return "retry", f"node failure: {', '.join(facts.lost_nodes)}; SLURM has put the job back into the queue"
    return "scheduler", "SLURM has already put the job back into the queue (preempted, or requeued by hand)"


def _cause(facts: Facts) -> str:
    if facts.lost_nodes and facts.cause is None:
        return f"node failure: {', '.join(facts.lost_nodes)}"
    if facts.cause:
        return facts.cause
    if facts.status_code is None and facts.code not in (EXIT_REFUSED, EXIT_REQUEUE, EXIT_DO_NOT_RESTART):
        return f"the ranks ended with exit code {facts.code} without a word"
    return f"the run ended with exit code {end_code(facts)}"
