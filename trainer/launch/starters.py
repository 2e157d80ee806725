"""The line of the batch script that starts the ranks, one form a starter. Pure: a plan in, shell words out."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

Starter = Literal["srun", "torchrun", "mpirun", "mpiexec"]

_OFFLINE = ("HF_HUB_OFFLINE=1", "TRANSFORMERS_OFFLINE=1")
STAGE_VARIABLE = "TRAINER_STAGE"
_OPEN_MPI_KILL_SECONDS = 5
"""When a rank ends with another code than 0 (75: saved), Open MPI waits this long, never less, and kills the others.
Its default of 1 s may cut off rank 0's last words."""


class StartPlan(Protocol):
    """What starting the ranks of a job depends on (`trainer.launch.slurm.LaunchPlan`)."""

    @property
    def nodes(self) -> int: ...
    @property
    def ranks_per_node(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def cpus_per_task(self) -> int | None: ...
    @property
    def starter(self) -> Starter: ...
    @property
    def mpi(self) -> Literal["none", "pmix", "pmi2"]: ...
    @property
    def online(self) -> bool: ...
    @property
    def stage(self) -> str | None: ...
    @property
    def stage_directory(self) -> str: ...
    @property
    def command(self) -> tuple[str, ...]: ...
    @property
    def python(self) -> str: ...


def start_line(
    plan: StartPlan,
    srun_options: Sequence[str] = (),
    contained: Callable[[tuple[str, ...]], tuple[str, ...]] = lambda command: command,
) -> str:
    """Return the command, quoted for bash, that starts ``plan.command`` once a rank and ends when all ranks have.

    ``srun_options`` are further ones for starters that use srun; ``contained`` puts a container around a command.
    """
    words = {"srun": _srun, "torchrun": _torchrun, "mpirun": _mpirun, "mpiexec": _mpiexec}[plan.starter](plan)
    variables = "" if plan.online else " ".join(_OFFLINE) + " \\\n  "
    options, command = words
    if plan.starter in ("srun", "torchrun"):
        options += srun_options
    return f"{variables}{shlex.join(options)} \\\n  {_from_stage(plan, contained(command))}"


def stage_lines(plan: StartPlan) -> list[str]:
    """Return the lines before the start that unpack launch.slurm.stage on every node, none where it isn't set."""
    if plan.stage is None:
        return []
    each_node = f"srun --overlap --nodes={plan.nodes} --ntasks={plan.nodes} --ntasks-per-node=1"
    unpack = 'umask 077; rm -rf "$0" && mkdir "$0" && tar -xf "$0.tar" -C "$0" && rm "$0.tar"'
    return [
        "# The environment of the ranks, once a node on its own disk (launch.slurm.stage)",
        f"{STAGE_VARIABLE}={shlex.quote(plan.stage_directory)}/trainer-$UID-$SLURM_JOB_ID",
        f"export {STAGE_VARIABLE}",
        f"""trap '{each_node} rm -rf "${STAGE_VARIABLE}" "${STAGE_VARIABLE}.tar" || true' EXIT""",
        f'sbcast --force {shlex.quote(plan.stage)} "${STAGE_VARIABLE}.tar" || not_started "sbcast failed (exit $?)"',
        f'{each_node} bash -c {shlex.quote(unpack)} "${STAGE_VARIABLE}" ||',
        '  not_started "launch.slurm.stage could not be unpacked (exit $?)"',
    ]


def _from_stage(plan: StartPlan, words: Sequence[str]) -> str:
    """Return ``words`` quoted for bash, with the staged interpreter instead of the plan's."""
    if plan.stage is None:
        return shlex.join(words)
    own = {plan.python, plan.command[0]}
    return " ".join(f'"${STAGE_VARIABLE}/bin/python"' if word in own else shlex.quote(word) for word in words)


def signal_target(plan: StartPlan) -> Literal["", "B:"]:
    """Return whom SLURM tells of the time limit, as ``sbatch --signal`` writes it.

    Steps of srun: SLURM signals every process in them, on every node. The first ranks of mpirun are in no step but in
    the batch shell's: the shell is told, and mpirun passes USR1 and USR2 on to all ranks.
    """
    return "" if plan.starter in ("srun", "torchrun") else "B:"


def _srun(plan: StartPlan) -> tuple[list[str], tuple[str, ...]]:
    return _step(plan, plan.ranks_per_node), plan.command


def _torchrun(plan: StartPlan) -> tuple[list[str], tuple[str, ...]]:
    # An agent of torchrun a node; trainer.launch.torchrun tells it the other nodes, and to live through USR1 and USR2.
    agent = (plan.python, "-m", "trainer.launch.torchrun", str(plan.ranks_per_node), "--")
    return _step(plan, 1), agent + plan.command


def _step(plan: StartPlan, tasks_per_node: int) -> list[str]:
    # KillOnBadExit is 0 by default: without it a job with a dead rank hangs until its time limit.
    options = [
        "srun",
        f"--nodes={plan.nodes}",
        f"--ntasks={plan.nodes * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}",
        "--kill-on-bad-exit=1",
        "--wait=60",
    ]
    if plan.cpus_per_task:  # since Slurm 22.05 srun does not inherit it from sbatch
        options.append(f"--cpus-per-task={plan.cpus_per_task * plan.ranks_per_node // tasks_per_node}")
    return options + ([f"--mpi={plan.mpi}"] if plan.mpi != "none" else [])


def _mpirun(plan: StartPlan) -> tuple[list[str], tuple[str, ...]]:
    # Open MPI finds the hosts in SLURM's variables and reaches them by srun. It binds ranks to single cores by default.
    options = ["mpirun", "--bind-to", "none", "--map-by", f"ppr:{plan.ranks_per_node}:node", "-n", str(plan.world_size)]
    return [*options, "--mca", "odls_base_sigkill_timeout", str(_OPEN_MPI_KILL_SECONDS)], plan.command


def _mpiexec(plan: StartPlan) -> tuple[list[str], tuple[str, ...]]:
    # Hydra (MPICH, Intel MPI) takes the hosts from SLURM's variables too.
    return ["mpiexec", "-n", str(plan.world_size), "-ppn", str(plan.ranks_per_node)], plan.command
