"""SLURM's commands, each called in one place, with a time limit and an error a person can act on."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.core.errors import TrainerError

_SUBMIT_SECONDS = 60.0
"""A busy controller answers late; after a time-out the job may or may not be queued, so this is generous."""
_ASK_SECONDS = 15.0
_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,200}")
_MAXIMUM_SHOWN = 20
"""scontrol is asked job by job."""
_GPU_COUNTS = ("GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK", "GRES")
_VARIABLES = {
    "time": ("TIMELIMIT",), "mem": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"), "switches": ("REQ_SWITCH",),
    "gpus-per-node": _GPU_COUNTS, "gpus-per-task": _GPU_COUNTS, "gres": _GPU_COUNTS,
    "mem-per-cpu": ("MEM_PER_NODE", "MEM_PER_GPU"), "mem-per-gpu": ("MEM_PER_NODE", "MEM_PER_CPU"),
    "core-spec": ("THREAD_SPEC",), "cpus-per-task": ("CPUS_PER_GPU",), "cpus-per-gpu": ("CPUS_PER_TASK",),
}  # fmt: skip
"""Of sbatch's options, where SBATCH_ and the option's name is not all: with those that exclude it."""
_NEVER_FROM_OUTSIDE = (
    "ARRAY_INX", "ERROR", "EXPORT", "GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK", "NO_KILL", "NO_REQUEUE", "OPEN_MODE",
    "REQUEUE", "SIGNAL", "WAIT",
)  # fmt: skip
"""Without these a job saves, starts again and is followed as the recipe and the command line say, or not at all."""
_JOB_ID = re.compile(r"[0-9]{1,12}(?:_[0-9]{1,9})?")


class SlurmCommandError(TrainerError):
    """A SLURM command is missing, refused, or did not answer."""


class SlurmTimeoutError(SlurmCommandError):
    """There was no answer in time."""


class SlurmRefusedError(SlurmCommandError):
    """The controller answered, and said no."""


def is_job_id(text: str) -> bool:
    """Return whether ``text`` is a job id, or that of an array task."""
    return _JOB_ID.fullmatch(text) is not None


def submit_script(script: Path, dependency: str | None = None) -> str:
    """Hand ``script`` to sbatch and return the job id. Raises SlurmCommandError.

    After a SlurmTimeoutError the job may be in the queue.
    """
    options = [f"--dependency={dependency}"] if dependency else []
    dropped = _overriding(script.read_text(encoding="utf-8"))
    try:
        answer = _run(["sbatch", "--parsable", *options, str(script)], _SUBMIT_SECONDS, without=dropped)
    except SlurmTimeoutError as error:
        raise SlurmTimeoutError(f"{error} → the job may be queued: look with squeue --me") from error
    job_id = answer.strip().split("\n")[-1].split(";")[0]  # "id;cluster" on a federation
    if not is_job_id(job_id):
        raise SlurmCommandError(f"sbatch answered {answer.strip()!r} instead of a job id")
    return job_id


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """What the controller says of a job."""

    state: str
    """RUNNING, COMPLETING, CANCELLED, ..."""
    reason: str
    """TimeLimit where the job was ended by it; most other ends give none."""
    restarts: int
    """Raised as soon as the job is to go back into the queue, while it still ends."""
    nodes: int
    partition: str
    features: str
    """Constraint; empty: none."""
    excluded: str
    """Host list; empty: none."""
    bound: bool = False
    """To the nodes of a reservation, or to nodes that it names."""
    memory_mb: float = 0.0
    """On each node, as the job's total says it; 0: not said."""
    gpus: float = 0.0
    """The same of GPUs of any type."""
    preempted: bool = False
    """Since it started: with PreemptMode=CANCEL neither state nor reason says so while the job ends."""


def show_job(job_id: str) -> JobFacts:
    """Return the facts of a job that the controller still knows. Raises SlurmCommandError."""
    answer = _run(["scontrol", "show", "job", _checked(job_id), "-o"], _ASK_SECONDS, SLURM_TIME_FORMAT="%s")
    names = "JobState|Reason|Restarts|NumNodes|Partition|Features|ExcNodeList|ReqNodeList|Reservation"
    names += "|PreemptTime|StartTime|ReqTRES|TRES|TresPerNode"
    fields = dict(re.findall(rf"(?:^|\s)({names})=(\S*)", answer))
    text = {name: "" if value in ("(null)", "None", "N/A", "Unknown") else value for name, value in fields.items()}
    counts = {name: re.match(r"[0-9]{1,9}", text.get(name, "")) for name in ("Restarts", "NumNodes")}
    times = [text.get(name, "") for name in ("PreemptTime", "StartTime")]
    tres = text.get("ReqTRES") or text.get("TRES", "")
    nodes = int(counts["NumNodes"][0]) if counts["NumNodes"] else 0  # "2" or "2-4"
    preempted, started = (int(time) if time.isdecimal() else 0 for time in times)
    return JobFacts(
        state=text.get("JobState", ""),
        reason=text.get("Reason", ""),
        restarts=int(counts["Restarts"][0]) if counts["Restarts"] else 0,
        nodes=nodes,
        partition=text.get("Partition", ""),
        features=text.get("Features", ""),
        excluded=text.get("ExcNodeList", ""),
        bound=bool(text.get("ReqNodeList") or text.get("Reservation")),
        memory_mb=_amount(r"(?:^|,)mem=([0-9.]+)([KMGTP]?)", tres) / max(nodes, 1),
        gpus=max(  # the total has them only where the site accounts for them
            _amount(r"(?:^|,)gres/gpu=([0-9]+)()", tres) / max(nodes, 1),
            _amount(r"(?:^|,)gres[:/]gpu(?:[:/][^:,=]+)?[:=]([0-9]+)()(?=,|$)", text.get("TresPerNode", "")),
        ),
        preempted=preempted > 0 and preempted >= started,  # an earlier start's stays in the job's record
    )


_MEGABYTES = {"K": 1 / 1024, "": 1.0, "M": 1.0, "G": 1024.0, "T": 1024.0**2, "P": 1024.0**3}


def _amount(pattern: str, text: str) -> float:
    """Return the sum of what ``pattern`` finds, a number and a unit each, in MB where there is a unit."""
    found: list[tuple[str, str]] = re.findall(pattern, text)
    return sum(float(number) * _MEGABYTES[unit] for number, unit in found if number.count(".") <= 1)


@dataclass(frozen=True)
class Node:
    """A node as the controller sees it."""

    name: str
    state: str
    features: frozenset[str]
    memory_mb: float = 0.0
    gpus: float = 0.0

    def holds(self, job: JobFacts) -> bool:
        """Whether the node has the memory and the GPUs of one node of ``job``."""
        return self.memory_mb >= job.memory_mb and self.gpus >= job.gpus

    @property
    def lost(self) -> bool:
        """Whether it is down or does not answer."""
        return self.state.startswith(("down", "fail", "unk")) or "*" in self.state

    @property
    def usable(self) -> bool:
        """Whether jobs may be put on it, now or when others have ended."""
        return not self.lost and self.state.startswith(("idle", "mix", "alloc", "comp", "plnd", "resv"))


def nodes_of(*, partition: str | None = None, names: Sequence[str] = ()) -> list[Node]:
    """Return the nodes of a partition (or several, with commas), or those named. Raises SlurmCommandError."""
    choice = ["-p", partition] if partition else []
    choice += ["-n", ",".join(names)] if names else []
    answer = _run(["sinfo", "-h", "-N", *choice, "-o", "%N|%t|%f|%m|%G"], _ASK_SECONDS)
    found: dict[str, Node] = {}
    for line in answer.splitlines():
        name, state, features, memory, gres = (*line.strip().split("|"), "", "", "", "")[:5]
        megabytes = _amount(r"^([0-9.]+)()", memory)
        gpus = _amount(r"(?:^|,)gpu(?::[^:,()]+)?:([0-9]+)()(?=[,(]|$)", gres)
        found[name] = Node(name, state.lower(), frozenset(features.split(",")), megabytes, gpus)
    return list(found.values())


def queue_json(job_ids: Sequence[str]) -> str:
    """Return what ``squeue --json`` says; some releases print all jobs of the cluster. Raises SlurmCommandError."""
    return _run(["squeue", "--json", "-t", "all", "-j", _list(job_ids)], _ASK_SECONDS)


def queue_lines(job_ids: Sequence[str]) -> str:
    """Return id|state|reason|start|end|nodes|user of jobs and array tasks, a line each. Raises SlurmCommandError."""
    return _run(["squeue", "-h", "-r", "-t", "all", "-j", _list(job_ids), "-o", "%i|%T|%r|%S|%e|%N|%u"], _ASK_SECONDS)


def show_jobs(job_ids: Sequence[str]) -> str:
    """Return what ``scontrol show job`` says of the jobs it knows, a line each. Raises SlurmCommandError."""
    lines: list[str] = []
    for job_id in job_ids[-_MAXIMUM_SHOWN:]:  # the newest: what is alive is among them
        try:
            lines.append(_run(["scontrol", "show", "job", "-o", _checked(job_id)], _ASK_SECONDS))
        except SlurmRefusedError as error:
            if "Invalid job id" not in str(error):
                raise
    return "\n".join(lines)


def accounted_jobs(job_ids: Sequence[str]) -> str:
    """Return id|state|start|end|nodes|user from the accounts, a line each. Raises SlurmCommandError without any."""
    form = "--format=JobID,State,Start,End,NodeList,User"
    return _run(["sacct", "-n", "-P", "-X", form, "-j", _list(job_ids)], _ASK_SECONDS)


def cancel_jobs(job_ids: Sequence[str]) -> None:
    """End jobs: those that wait at once, those that run by SIGTERM and, KillWait later, SIGKILL.

    Raises SlurmCommandError.
    """
    _run(["scancel", *(_checked(job_id) for job_id in job_ids)], _SUBMIT_SECONDS)


def cluster_config() -> dict[str, str]:
    """Return ``scontrol show config`` by name. Raises SlurmCommandError."""
    answer = _run(["scontrol", "show", "config"], _ASK_SECONDS)
    return dict(re.findall(r"^(\w+)[ \t]*=[ \t]*(.*?)[ \t]*$", answer, re.MULTILINE))


def node_kinds() -> list[tuple[str, str, str, str, str, str]]:
    """Return (partition, * after the default; time limit; nodes; CPUs; MB; gres), a row for nodes that are alike.

    Raises SlurmCommandError.
    """
    answer = _run(["sinfo", "-h", "-a", "-o", "%P|%l|%D|%c|%m|%G"], _ASK_SECONDS)
    rows = [line.strip().split("|") for line in answer.splitlines()]
    return [(row[0], row[1], row[2], row[3], row[4], row[5]) for row in rows if len(row) == 6]


def mpi_types() -> list[str]:
    """Return what ``srun --mpi`` takes; nothing where it can't be asked."""
    try:
        answer = _run(["srun", "--mpi=list"], _ASK_SECONDS, errors_too=True)
    except SlurmCommandError:
        return []
    return [word for line in answer.splitlines() if re.fullmatch(r"\s+\w+", line) for word in line.split()]


def srun_has_option(option: str) -> bool:
    """Return whether srun knows ``option``: plugins add theirs."""
    try:
        return option in _run(["srun", "--help"], _ASK_SECONDS)
    except SlurmCommandError:
        return False


def user_name() -> str:
    """Return whose jobs ours are. By the system, not by $LOGNAME, which SLURM does not look at."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container without the user in its passwd
        return str(os.geteuid())


def accounts_of_user() -> list[str]:
    """Return the accounts this user may charge; nothing where the cluster keeps none."""
    form = ["format=account", f"user={user_name()}"]
    try:
        answer = _run(["sacctmgr", "-n", "-P", "show", "associations", *form], _ASK_SECONDS)
    except SlurmCommandError:
        return []
    return sorted({line.strip() for line in answer.splitlines() if line.strip()})


def accepts_options(options: Sequence[str]) -> bool:
    """Return whether sbatch would take a job with these options. Nothing is submitted."""
    try:
        _run(["sbatch", "--test-only", *options, "--wrap=true"], _SUBMIT_SECONDS)
    except SlurmRefusedError:
        return False
    return True


def test_script(text: str) -> None:
    """Raise SlurmRefusedError where sbatch would not take this batch script. Nothing is submitted."""
    _run(["sbatch", "--test-only"], _SUBMIT_SECONDS, input_text=text, without=_overriding(text))


def run_on_node(options: Sequence[str], command: Sequence[str], seconds: float) -> str:
    """Run a command as one task on one node and return what it printed. Raises SlurmCommandError."""
    return _run(["srun", "--nodes=1", "--ntasks=1", "--quiet", *options, *command], seconds)


def node_address(node: str) -> str | None:
    """Return the address by which SLURM reaches a node, None where it knows none. Raises SlurmCommandError."""
    if _NODE_NAME.fullmatch(node) is None:
        return None
    answer = _run(["scontrol", "show", "node", node, "-o"], _ASK_SECONDS)
    found = re.search(r"(?:^|\s)NodeAddr=(\S+)", answer)
    return found[1] if found else None


def job_end_unix(job_id: str) -> float | None:
    """Return when SLURM ends a job, in seconds since 1970, None where it doesn't say. Raises SlurmCommandError."""
    answer = _run(["scontrol", "show", "job", _checked(job_id), "-o"], _ASK_SECONDS, SLURM_TIME_FORMAT="%s")
    found = re.search(r"(?:^|\s)EndTime=([0-9]{1,12})(?:\s|$)", answer)
    return float(found[1]) if found else None


def requeue_job(job_id: str) -> None:
    """Put a job back into the queue, if it is not there already. Raises SlurmCommandError."""
    try:
        _run(["scontrol", "requeue", _checked(job_id)], _ASK_SECONDS)
    except SlurmRefusedError as error:
        if "pending execution" not in str(error):  # SLURM was faster: a node has failed
            raise


def exclude_nodes(job_id: str, hosts: Sequence[str]) -> None:
    """Let a job that waits in the queue, or is on its way there, avoid exactly ``hosts``. Raises SlurmCommandError."""
    _run(["scontrol", "update", f"JobId={_checked(job_id)}", f"ExcNodeList={','.join(hosts)}"], _ASK_SECONDS)


def _list(job_ids: Sequence[str]) -> str:
    return ",".join(_checked(job_id) for job_id in job_ids)


def _checked(job_id: str) -> str:
    if not is_job_id(job_id):
        raise SlurmCommandError(f"{job_id!r} is not a SLURM job id")
    return job_id


def _overriding(script: str) -> frozenset[str]:
    """Return the variables that sbatch would obey rather than the lines of ``script``.

    What the script leaves open is left to them: a site's SBATCH_ACCOUNT, say.
    """
    options = set(re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE))
    names = {name for option in options for name in _VARIABLES.get(option, ())}
    names |= {option.upper().replace("-", "_") for option in options}
    return frozenset(f"SBATCH_{name}" for name in (*names, *_NEVER_FROM_OUTSIDE))


def _run(
    command: list[str], seconds: float, *, input_text: str | None = None, errors_too: bool = False,
    without: frozenset[str] = frozenset(), **variables: str,
) -> str:  # fmt: skip
    # The variables of a job we run in (SLURM_NTASKS...) would steer the new one. The cluster's address and a site's
    # defaults (SBATCH_ACCOUNT...) stay.
    environment = {
        name: value
        for name, value in os.environ.items()
        if (not name.startswith("SLURM_") or name in ("SLURM_CONF", "SLURM_CLUSTERS")) and name not in without
    } | variables
    try:
        done = subprocess.run(
            command, input=input_text, capture_output=True, text=True, errors="replace", timeout=seconds,
            env=environment, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise SlurmCommandError(
            f"{command[0]} is not installed here: run this on a login node of the cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmTimeoutError(f"{command[0]} did not answer within {seconds:.0f} s: is the controller up?") from None
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        raise SlurmRefusedError(f"{command[0]} refused: {said}")
    return done.stdout + done.stderr if errors_too else done.stdout
