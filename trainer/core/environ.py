"""Who am I among the ranks: read what a launcher left in the environment, and write what PyTorch and DeepSpeed read.

The only reader of ``os.environ`` for ranks; everything above receives a `RankEnvironment`. Variables were read off real
launches (torchrun 2.13, deepspeed 0.19, Slurm 22.05, Open MPI 4.1/5.0, MPICH 5.0).
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.core.errors import Problem, RefusedError
from trainer.core.hostlist import expand_hostlist, expand_tasks_per_node, fills_hosts

Launcher = Literal["local", "ssh", "torchrun", "deepspeed", "environment", "slurm", "openmpi", "mpich"]
_RANK_LAUNCHERS: tuple[Launcher, ...] = (
    "local", "ssh", "torchrun", "deepspeed", "environment", "slurm", "openmpi", "mpich",
)  # fmt: skip

LAUNCHER_VARIABLE = "TRAINER_LAUNCHER"
PARENT_VARIABLE = "TRAINER_LAUNCHER_PID"
ALLOCATED_VARIABLE = "TRAINER_ALLOCATED_SINCE"
"""Set by the batch script: when it started, in seconds since 1970. older Slurm does not say it itself."""
THREADS_VARIABLE = "TRAINER_THREADS"
_OF_RANKS = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_SIZE|LOCAL_WORLD_SIZE|GROUP_RANK|NODE_RANK|CROSS_RANK|CROSS_SIZE)$"
    r"|MASTER_|TORCHELASTIC_|TRAINER_|OMPI_|PMI_|PMIX_|MPI_|SLURM_(PROCID|LOCALID|NTASKS|STEP|TASK)"
)
_INTEGER = re.compile(r"-?[0-9]{1,10}")
_FIRST_PORT, _PORT_COUNT = 20_000, 10_000
"""Rendezvous ports 20000-29999: below Linux's ephemeral range (from 32768), so no outgoing connection holds one."""
_FIRST_SPECIAL_STEP = 0xFFFF_FFF0
"""Slurm numbers its own steps (batch, extern, interactive) from the top of 32 bits; task steps count from 0."""


@dataclass(frozen=True)
class RankEnvironment:
    """One process's place among the ranks."""

    rank: int
    world_size: int
    local_rank: int
    """-1 under MPI libraries that do not say; `trainer.launch.mpirun.discover` fills it."""
    local_world_size: int
    node_rank: int
    master_address: str
    """Host of rank 0; empty under MPI until `trainer.launch.mpirun.discover` has asked rank 0."""
    master_port: int
    """0 where ``master_address`` is empty."""
    launcher: Launcher

    @property
    def needs_discovery(self) -> bool:
        """Whether the ranks must still agree on an address over MPI."""
        return not self.master_address or self.local_rank < 0


def detect(environment: Mapping[str, str]) -> RankEnvironment | None:
    """Return this process's place among the ranks, or None when no launcher started it.

    The innermost launcher wins: torchrun inside srun, or mpirun inside sbatch, leave the outer one's variables behind.
    Raises RefusedError naming every variable that is missing, not an integer, or contradicts another.
    """
    reader = _Reader(environment)
    found: RankEnvironment | None = None
    if "RANK" in environment:
        found = _from_rank_variables(reader)
    elif "OMPI_COMM_WORLD_RANK" in environment:
        found = _from_mpi(reader, "openmpi", "OMPI_COMM_WORLD_", "LOCAL_RANK", "LOCAL_SIZE", "OMPI_COMM_WORLD_")
    elif "PMI_RANK" in environment and ("MPI_LOCALRANKID" in environment or not _in_task_step(environment)):
        # Under srun --mpi=pmi2 PMI_RANK is set too, but then Slurm's variables say more and need no MPI library.
        found = _from_mpi(reader, "mpich", "PMI_", "LOCALRANKID", "LOCALNRANKS", "MPI_")
    elif _in_task_step(environment):
        found = _from_slurm(reader)
    else:
        for name in ("WORLD_SIZE", "LOCAL_RANK"):
            if name in environment:
                reader.refuse(name, environment[name], "is set without RANK", f"unset {name}, or start with a launcher")
    reader.finish()
    return found


def export(ranks: RankEnvironment, environment: MutableMapping[str, str]) -> None:
    """Write the variables that PyTorch and DeepSpeed read; `detect` reads the same place back from them.

    ``OMP_NUM_THREADS`` is set only where the user has not: the cores this process may use, shared by the node's ranks.
    """
    environment.update(
        RANK=str(ranks.rank),
        WORLD_SIZE=str(ranks.world_size),
        LOCAL_RANK=str(ranks.local_rank),
        LOCAL_WORLD_SIZE=str(ranks.local_world_size),
        LOCAL_SIZE=str(ranks.local_world_size),  # read by DeepSpeed's CPU accelerator and its shm all-reduce
        NODE_RANK=str(ranks.node_rank),
        MASTER_ADDR=ranks.master_address,
        MASTER_PORT=str(ranks.master_port),
    )
    environment[LAUNCHER_VARIABLE] = ranks.launcher
    derive_threads(environment, ranks.local_world_size)
    interface = gloo_interface(environment, [name for _, name in socket.if_nameindex()])
    if interface is not None:
        environment["GLOO_SOCKET_IFNAME"] = interface


def derive_threads(environment: MutableMapping[str, str], local_world_size: int) -> None:
    """Set ``OMP_NUM_THREADS`` where the user has not, and note that it was not the user."""
    if "OMP_NUM_THREADS" not in environment:
        environment["OMP_NUM_THREADS"] = str(max(1, usable_cores() // local_world_size))
        environment[THREADS_VARIABLE] = "derived"


def threads_are_derived(environment: Mapping[str, str]) -> bool:
    """Return whether ``OMP_NUM_THREADS`` is a number of ours, which a rank may correct once it is bound to CPUs."""
    return environment.get(THREADS_VARIABLE) == "derived"


def gloo_interface(environment: Mapping[str, str], interfaces: Sequence[str]) -> str | None:
    """Return the network interface that NCCL was told to use, for gloo, if gloo was told none.

    Checkpoints are agreed on over gloo on GPUs too. It looks for the address of the host's name, which is often the
    loopback one or that of a slow network. NCCL takes lists of prefixes, of names after "=", of others after "^".
    """
    wanted = environment.get("NCCL_SOCKET_IFNAME", "")
    if not wanted or wanted.startswith("^") or environment.get("GLOO_SOCKET_IFNAME"):
        return None
    names = wanted.removeprefix("=").split(",")
    exact = wanted.startswith("=")
    fits = [found for name in names for found in interfaces if found == name or (not exact and found.startswith(name))]
    return fits[0] if fits else None


def without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Return ``environment`` less what tells a process its place: a command that a rank starts is no rank."""
    return {name: value for name, value in environment.items() if not _OF_RANKS.match(name)}


def usable_cores() -> int:
    """Return the cores this process may run on (a SLURM or container limit counts, where the system tells)."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def slurm_job(environment: Mapping[str, str]) -> tuple[str, str, int] | None:
    """Return (cluster, job id, how often it was requeued) of the SLURM job this process is in, None outside of one."""
    job, restarts = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_RESTART_COUNT", "")
    if not job:
        return None
    return environment.get("SLURM_CLUSTER_NAME", ""), job, int(restarts) if _INTEGER.fullmatch(restarts) else 0


def allocated_since(environment: Mapping[str, str]) -> float | None:
    """Return when the job got its nodes, in seconds since 1970; None where nobody says so."""
    for name in ("SLURM_JOB_START_TIME", ALLOCATED_VARIABLE):
        value = environment.get(name, "")
        if _INTEGER.fullmatch(value) and int(value) > 0:
            return float(value)
    return None


def process_started_unix() -> float:
    """Return when this process started, to about 10 ms; now, where the system does not say it."""
    now = time.time()
    if sys.platform != "linux":
        return now
    try:
        text = Path("/proc/self/stat").read_text(errors="replace")
        # proc(5): the name in parentheses may hold anything; the start is the 20th field after it.
        ticks = int(text.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return now
    age_seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return now - max(0.0, age_seconds)


def host_of_rank(environment: Mapping[str, str], rank: int) -> str | None:
    """Return the host of another rank of this step of srun, None where only the launcher knows it.

    True of srun's default order, which fills one node after the other.
    """
    if environment.get(LAUNCHER_VARIABLE) != "slurm" or not fills_hosts(environment.get("SLURM_DISTRIBUTION")):
        return None
    try:
        hosts = expand_hostlist(environment.get("SLURM_STEP_NODELIST", ""))
        per_node = expand_tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    except ValueError:
        return None
    places = [host for host, tasks in zip(hosts, per_node, strict=False) for _ in range(tasks)]
    return places[rank] if rank < len(places) else None


def uses_agent_store(environment: Mapping[str, str]) -> bool:
    """Return whether torchrun's agent listens at MASTER_PORT, and not rank 0."""
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def die_with_parent(environment: Mapping[str, str]) -> None:
    """Ask Linux to kill this process (SIGKILL) when the process that launched it dies. No-op on other systems.

    Call it once at the start of a rank, from the main thread. A launcher may die before the request is made; where ours
    left its process id in the environment that is noticed, and this process kills itself.
    """
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    if ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # Not "parent is 1": a launcher may itself be process 1 of a container.
    if environment.get(LAUNCHER_VARIABLE) in ("local", "ssh") and environment.get(PARENT_VARIABLE) != str(os.getppid()):
        os.kill(os.getpid(), signal.SIGKILL)


class _Reader:
    """Reads integers out of an environment and gathers every problem, so that one error names them all."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.problems: list[Problem] = []

    def refuse(self, name: str, value: str | int | None, rule: str, fix: str = "") -> None:
        self.problems.append(Problem(name, value, rule, fix))

    def text(self, *names: str, why: str) -> str:
        """Return the first of ``names`` that is set and not empty; record a problem when none is."""
        for name in names:
            if self.environment.get(name):
                return self.environment[name]
        self.refuse(names[0], None, f"is not set although {why}", "start the ranks with one launcher")
        return ""

    def integer(self, *names: str, why: str, least: int = 0, default: int | None = None) -> int:
        """Return the first of ``names`` that is set, as an integer of at least ``least``."""
        for name in names:
            value = self.environment.get(name)
            if value is None:
                continue
            if not _INTEGER.fullmatch(value):
                self.refuse(name, value, "must be an integer")
                return least
            number = int(value)
            if number < least:
                self.refuse(name, number, f"must be at least {least}")
                return least
            return number
        if default is None:
            self.refuse(names[0], None, f"is not set although {why}", "start the ranks with one launcher")
            return least
        return default

    def below(self, name: str, value: int, limit_name: str, limit: int) -> None:
        if not self.problems and value >= limit:
            self.refuse(name, value, f"must be below {limit_name} = {limit}")

    def finish(self) -> None:
        if self.problems:
            raise RefusedError(self.problems, title="the launcher's environment variables can't be used")


def _port(reader: _Reader, default: int | None, why: str) -> int:
    port = reader.integer("MASTER_PORT", why=why, least=1, default=default)
    if port > 65535:
        reader.refuse("MASTER_PORT", port, "must be at most 65535")
    return port


def _from_rank_variables(reader: _Reader) -> RankEnvironment:
    """RANK and its companions: our local launcher, torchrun, deepspeed, or a user's own script."""
    environment = reader.environment
    rank = reader.integer("RANK", why="")
    world_size = reader.integer("WORLD_SIZE", why="RANK is", least=1)
    alone = 0 if world_size == 1 else None
    local_rank = reader.integer("LOCAL_RANK", why="RANK is", default=alone)
    local_world_size = reader.integer(
        "LOCAL_WORLD_SIZE", "LOCAL_SIZE", why="RANK is", least=1, default=None if alone is None else 1
    )
    address = reader.text("MASTER_ADDR", why="RANK is")
    port = _port(reader, None, "RANK is")
    reader.below("RANK", rank, "WORLD_SIZE", world_size)
    reader.below("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_world_size)
    reader.below("LOCAL_WORLD_SIZE", local_world_size, "WORLD_SIZE + 1", world_size + 1)
    node_rank = reader.integer(
        "GROUP_RANK", "NODE_RANK", "CROSS_RANK", why="", default=rank // max(1, local_world_size)
    )
    launcher: Launcher = "environment"
    if "TORCHELASTIC_RUN_ID" in environment:
        launcher = "torchrun"
    elif "CROSS_SIZE" in environment:
        launcher = "deepspeed"
    elif environment.get(LAUNCHER_VARIABLE) in _RANK_LAUNCHERS:
        launcher = next(name for name in _RANK_LAUNCHERS if name == environment[LAUNCHER_VARIABLE])
    elif _in_task_step(environment):
        _agree_with_slurm(reader, rank, world_size)
    return RankEnvironment(rank, world_size, local_rank, local_world_size, node_rank, address, port, launcher)


def _agree_with_slurm(reader: _Reader, rank: int, world_size: int) -> None:
    """Refuse `export RANK=$SLURM_PROCID` written in a batch script: it is expanded there, to 0 for every task."""
    task = reader.integer("SLURM_PROCID", why="SLURM_STEP_ID is")
    tasks = reader.integer("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", why="SLURM_STEP_ID is", least=1)
    if world_size == tasks and rank != task:
        reader.refuse(
            "RANK",
            rank,
            f"contradicts SLURM_PROCID = {task}",
            "unset RANK and WORLD_SIZE: srun's own variables are enough",
        )


def _from_mpi(
    reader: _Reader, launcher: Launcher, world_prefix: str, local_rank: str, local_size: str, local_prefix: str
) -> RankEnvironment:
    """mpirun or mpiexec; the address comes from MPI itself unless MASTER_ADDR and MASTER_PORT were given."""
    why = f"{world_prefix}RANK is"
    rank = reader.integer(f"{world_prefix}RANK", why=why)
    world_size = reader.integer(f"{world_prefix}SIZE", why=why, least=1)
    on_node = reader.integer(f"{local_prefix}{local_rank}", why=why, least=0, default=-1)
    node_size = reader.integer(f"{local_prefix}{local_size}", why=why, least=1, default=1)
    reader.below(f"{world_prefix}RANK", rank, f"{world_prefix}SIZE", world_size)
    if on_node >= 0:
        reader.below(f"{local_prefix}{local_rank}", on_node, f"{local_prefix}{local_size}", node_size)
    address, port = reader.environment.get("MASTER_ADDR", ""), 0
    if address and "MASTER_PORT" in reader.environment:
        port = _port(reader, None, why)
    else:
        address = ""
    return RankEnvironment(rank, world_size, on_node, node_size, rank // node_size, address, port, launcher)


def _in_task_step(environment: Mapping[str, str]) -> bool:
    """Tell a task of srun from a batch shell, an salloc shell or `srun --pty bash`.

    SLURM_PROCID=0 is set in all of them but salloc; only a task step has a small number in SLURM_STEP_ID.
    """
    step = environment.get("SLURM_STEP_ID", "")
    if "SLURM_PROCID" not in environment or "SLURM_PTY_PORT" in environment:
        return False
    return step.isascii() and step.isdigit() and int(step) < _FIRST_SPECIAL_STEP


def _from_slurm(reader: _Reader) -> RankEnvironment:
    environment = reader.environment
    why = "SLURM_STEP_ID is"
    rank = reader.integer("SLURM_PROCID", why=why)
    world_size = reader.integer("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", why=why, least=1)
    local_rank = reader.integer("SLURM_LOCALID", why=why)
    node_rank = reader.integer("SLURM_NODEID", why=why)
    hosts = _slurm_hosts(reader, reader.text("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST", why=why))
    per_node = _slurm_tasks_per_node(
        reader, reader.text("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", why=why), world_size
    )
    reader.below("SLURM_PROCID", rank, "SLURM_STEP_NUM_TASKS", world_size)
    reader.below("SLURM_NODEID", node_rank, "the nodes of SLURM_STEP_TASKS_PER_NODE", len(per_node))
    local_world_size = per_node[node_rank] if node_rank < len(per_node) else 1
    reader.below("SLURM_LOCALID", local_rank, "the tasks of this node", local_world_size)
    address = environment.get("MASTER_ADDR") or (hosts[0] if hosts else "")
    if len(hosts) > 1 and (address == "localhost" or address.startswith("127.") or address == "::1"):
        reader.refuse(
            "MASTER_ADDR", address, f"is this host only, but the job has {len(hosts)} nodes", "unset MASTER_ADDR"
        )
    job = reader.integer("SLURM_JOB_ID", "SLURM_JOBID", why=why)
    step = reader.integer("SLURM_STEP_ID", why=why)
    restarts = reader.integer("SLURM_RESTART_COUNT", why=why, default=0)
    # A requeued run may meet an orphan of its former self on a node, hence the restart count. 61 and 7 keep
    # neighbouring jobs, steps and restarts apart.
    port = _port(reader, _FIRST_PORT + (job * 61 + step + restarts * 7) % _PORT_COUNT, why)
    return RankEnvironment(rank, world_size, local_rank, local_world_size, node_rank, address, port, "slurm")


def _slurm_hosts(reader: _Reader, text: str) -> list[str]:
    if not text:
        return []
    try:
        return expand_hostlist(text)
    except ValueError as error:
        reader.refuse("SLURM_STEP_NODELIST", text, str(error))
        return []


def _slurm_tasks_per_node(reader: _Reader, text: str, world_size: int) -> list[int]:
    if not text:
        return []
    try:
        per_node = expand_tasks_per_node(text)
    except ValueError as error:
        reader.refuse("SLURM_STEP_TASKS_PER_NODE", text, str(error))
        return []
    if sum(per_node) != world_size:
        reader.refuse(
            "SLURM_STEP_TASKS_PER_NODE", text, f"adds up to {sum(per_node)}, not to SLURM_STEP_NUM_TASKS = {world_size}"
        )
    return per_node
