"""Nodes that a run failed on lately, left out of a job that is about to be submitted for it."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable

from trainer.core.hostlist import expand_hostlist
from trainer.launch.excluded_nodes import excluded_now, that_leave_room
from trainer.launch.slurm import LaunchPlan
from trainer.launch.slurm_commands import JobFacts, SlurmCommandError, nodes_of

_BINDING = ("nodelist", "nodefile", "reservation")
_MEGABYTES = {"K": 1 / 1024, "M": 1.0, "": 1.0, "G": 1024.0, "T": 1024.0**2}


def with_avoided_nodes(plan: LaunchPlan, say: Callable[[str], None]) -> LaunchPlan:
    """Return ``plan`` with the nodes that its job should avoid, as far as enough others remain; says which."""
    if plan.sweep:  # its tasks share one script, and each has failures of its own
        return plan
    active = excluded_now(plan.run_directory, plan.max_excluded_nodes)
    if not active:
        return plan
    try:
        own = expand_hostlist(plan.exclude) if plan.exclude else []
        active = [host for host in active if host not in own]
        partition = plan.partition or os.environ.get("SBATCH_PARTITION")
        room = that_leave_room(active, _job(plan), own, nodes_of(partition=partition))
    except (SlurmCommandError, ValueError) as error:
        say(f"nodes that the run failed on ({', '.join(active)}) are not left out: {error}")
        return plan
    if room:
        say(f"left out, since the run failed on them lately: {', '.join(room)}")
    if len(room) < len(active):
        rest = ", ".join(host for host in active if host not in room)
        say(
            f"the run failed on {rest} lately, but too few nodes would remain, or the job names the nodes that it needs"
        )
    return dataclasses.replace(plan, avoid=tuple(room))


def _job(plan: LaunchPlan) -> JobFacts:
    memory = re.fullmatch(r"([0-9]+)([KMGT]?)B?", (plan.memory_per_node or "0").upper())
    bound = plan.reservation or os.environ.get("SBATCH_RESERVATION") or any(o in plan.sbatch_options for o in _BINDING)
    return JobFacts(
        state="", reason="", restarts=0, nodes=plan.nodes, partition=plan.partition or "",
        features=plan.constraint or os.environ.get("SBATCH_CONSTRAINT", ""), excluded="", bound=bool(bound),
        memory_mb=int(memory[1]) * _MEGABYTES[memory[2]] if memory else 0.0, gpus=float(plan.gpus_per_node),
    )  # fmt: skip
