"""What SLURM says of jobs: from squeue, in the shapes of its releases, from scontrol, or from the accounts."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from trainer.launch.slurm_commands import (
    SlurmCommandError,
    SlurmRefusedError,
    SlurmTimeoutError,
    accounted_jobs,
    queue_json,
    queue_lines,
    show_jobs,
)

_NOTHING = ("", "N/A", "(null)", "None", "Unknown", "n/a")
_TASKS = re.compile(r"([0-9]+)(?:-([0-9]+)(?::([0-9]+))?)?")
_MAXIMUM_TASKS = 10_000
_FORGOTTEN = re.compile(r"Invalid job id", re.IGNORECASE)
"""The controller knows no such job (any more): that is an answer."""
_NO_ACCOUNTS = re.compile(r"disabled|not running a supported")
_AWAY = re.compile(r"Unable to contact|connect failure|Connection refused|timed out", re.IGNORECASE)
"""The controller is away: each further command would wait for it too."""
_LARGEST_TIME = 2**33
"""Of a time, in seconds since 1970: SLURM writes the largest numbers it has for "none" and "infinite"."""

WAITING = frozenset(
    ("PENDING", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT", "LAUNCH_FAILED")
)  # fmt: skip
"""In the queue or held there. A job whose launch failed is put back and held."""
FINAL = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
     "TIMEOUT")
)  # fmt: skip
"""Over. Any other state, also of a later release, is taken for alive: SIGNALING, STAGE_OUT, RESIZING..."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job, or one task of a job array; None where SLURM did not say."""

    id: str
    """123, or 123_4 for a task of an array."""
    state: str
    """PENDING, RUNNING, COMPLETED..."""
    reason: str | None = None
    """Why it waits (Priority, Resources, BeginTime, Dependency...), or why it ended so."""
    start_unix: float | None = None
    """When it started; when it is expected to, while it waits."""
    end_unix: float | None = None
    """When it ended; its time limit, while it runs."""
    nodes: str | None = None
    restarts: int | None = None
    """How often SLURM has started it again."""
    user: str | None = None

    @property
    def ended(self) -> bool:
        """Whether it is over: not waiting, running, or on its way between the two."""
        return self.state in FINAL

    @property
    def waits(self) -> bool:
        """Whether it is in the queue, or held there."""
        return self.state in WAITING


@dataclass(frozen=True)
class Queue:
    """The jobs that were asked for and are still known, and why that may not be all."""

    jobs: tuple[Job, ...] = ()
    note: str | None = None
    """Why SLURM could not be asked."""

    def of(self, ids: Iterable[str]) -> list[Job]:
        """Return the jobs of ``ids``, in that order; an array's id stands for its tasks."""
        return [job for job_id in ids for job in self.jobs if _belongs(job, job_id)]


def ask_queue(ids: Sequence[str]) -> Queue:
    """Return what SLURM knows of jobs. Nothing is raised.

    After a command that does not answer no other is tried, but for ``squeue --json``, which in some releases prints all
    jobs of the cluster.
    """
    found: list[Job] = []
    notes: list[str] = []
    controller, answered = (_from_lines, _from_scontrol), False
    for ask in (_from_json, _from_lines, _from_scontrol, _from_accounts):
        missing = [job_id for job_id in ids if not any(_belongs(job, job_id) for job in found)]
        if not missing:
            break
        try:
            found += [job for job in ask(missing) if any(_belongs(job, job_id) for job_id in missing)]
            answered = answered or ask in controller
        except SlurmRefusedError as error:
            if _FORGOTTEN.search(str(error)):
                answered = answered or ask in controller
            elif not _NO_ACCOUNTS.search(str(error)):
                notes.append(str(error))
            if _AWAY.search(str(error)):
                break
        except SlurmCommandError as error:
            notes.append(str(error))
            if not (ask is _from_json and isinstance(error, SlurmTimeoutError)):
                break
        except (ValueError, TypeError, LookupError, AttributeError):
            continue  # a release whose answer has another shape: the next command has a simpler one
    # A job that the controller does not know is over, whatever another command said.
    return Queue(tuple(found), notes[0] if notes and not found and not answered else None)


def _belongs(job: Job, job_id: str) -> bool:
    return job.id == job_id or job.id.startswith(f"{job_id}_")


def _from_json(ids: Sequence[str]) -> list[Job]:
    # Releases of 22 print every job of the cluster whatever they are asked for.
    content = cast("dict[str, Any]", json.loads(queue_json(ids)))
    if content.get("errors"):  # without a controller 22.05 says so here alone: exit code 0, and no jobs
        raise ValueError("squeue --json found no jobs because of an error")
    wanted = {job_id.partition("_")[0] for job_id in ids}
    jobs: list[Job] = []
    for fields in cast("list[dict[str, Any]]", content["jobs"]):
        own, array = str(_number(fields["job_id"])), _number(fields.get("array_job_id"))
        if own in wanted or str(array or "") in wanted:
            jobs += _json_jobs(fields, own, array)
    return jobs


def _json_jobs(fields: Mapping[str, Any], own: str, array: int | None) -> list[Job]:
    state = fields["job_state"]
    job = Job(
        id=own,
        # A list in newer releases: the state, and flags such as COMPLETING or REQUEUED.
        state=str(cast("list[object]", state)[0] if isinstance(state, list) else state),
        reason=_text(fields.get("state_reason")),
        start_unix=_unix(fields.get("start_time")),
        end_unix=_unix(fields.get("end_time")),
        nodes=_text(fields.get("nodes")),
        restarts=_number(fields.get("restart_cnt")),
        user=_text(fields.get("user_name")),
    )
    task, waiting = _number(fields.get("array_task_id")), _text(fields.get("array_task_string"))
    if not array:
        return [job]
    if waiting is not None:  # all tasks that have not begun are one entry
        return [replace(job, id=f"{array}_{number}") for number in expand_tasks(waiting)]
    return [replace(job, id=f"{array}_{task}" if task is not None else own)]


def expand_tasks(text: str) -> list[int]:
    """Return the task numbers of ``1-3,7,10-20:5%2``; those after an ellipsis are not known."""
    numbers: list[int] = []
    for part in text.partition("%")[0].strip("[]").split(","):
        match = _TASKS.fullmatch(part)
        if match is None:
            continue
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        numbers += range(first, min(last, first + _MAXIMUM_TASKS) + 1, max(1, step))
    return numbers[:_MAXIMUM_TASKS]


def _from_lines(ids: Sequence[str]) -> list[Job]:
    return _rows(queue_lines(ids), ("id", "state", "reason", "start", "end", "nodes", "user"))


def _from_scontrol(ids: Sequence[str]) -> list[Job]:
    jobs: list[Job] = []
    for line in show_jobs(ids).splitlines():
        fields = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", line))
        if "JobId" not in fields:
            continue
        job = Job(
            id=fields["JobId"],
            state=fields.get("JobState", ""),
            reason=_text(fields.get("Reason")),
            start_unix=_time(fields.get("StartTime")),
            end_unix=_time(fields.get("EndTime")),
            nodes=_text(fields.get("NodeList")),
            restarts=int(fields["Restarts"]) if fields.get("Restarts", "").isdecimal() else None,
            user=_text(fields.get("UserId", "").partition("(")[0]),
        )
        tasks = expand_tasks(fields.get("ArrayTaskId", ""))
        jobs += [replace(job, id=f"{fields.get('ArrayJobId')}_{number}") for number in tasks] or [job]
    return jobs


def _from_accounts(ids: Sequence[str]) -> list[Job]:
    rows = _rows(accounted_jobs(ids), ("id", "state", "start", "end", "nodes", "user"))
    return [replace(job, state=job.state.split()[0]) for job in rows if job.state]  # "CANCELLED by 1000"


def _rows(text: str, names: Sequence[str]) -> list[Job]:
    """Return the jobs of lines whose fields, divided by bars, have these names."""
    jobs: list[Job] = []
    for line in text.splitlines():
        fields = dict(zip(names, line.strip().split("|"), strict=False))
        if len(fields) < len(names) or not re.fullmatch(r"[0-9]+(_[0-9]+)?", fields["id"]):
            continue
        jobs.append(
            Job(
                id=fields["id"],
                state=fields["state"],
                reason=_text(fields.get("reason")),
                start_unix=_time(fields["start"]),
                end_unix=_time(fields["end"]),
                nodes=_text(fields["nodes"]),
                user=_text(fields["user"]),
            )
        )
    return jobs


def _number(value: object) -> int | None:
    """Return an integer as old releases write it, or {"set": true, "infinite": false, "number": 3} as new ones do."""
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        value = fields.get("number") if fields.get("set") and not fields.get("infinite") else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _unix(value: object) -> int | None:
    number = _number(value)
    return number if number is not None and 0 < number < _LARGEST_TIME else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value not in _NOTHING else None


def _time(text: str | None) -> float | None:
    """Return a local time such as 2026-11-25T20:09:32 in seconds since 1970."""
    try:
        return time.mktime(time.strptime(text or "", "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):
        return None
