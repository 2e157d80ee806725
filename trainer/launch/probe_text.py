"""A site profile as text: what was found as values, and what a person should know as comments."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainer.config.yaml_text import dump_yaml

if TYPE_CHECKING:
    from trainer.launch.probe import Findings

_DAY = "24:00:00"


def profile_text(findings: Findings) -> str:
    """Return the YAML of the profile. Values of the profile that was named stay as they are."""
    values = {**_values(findings), **findings.given}
    lines = [f"# {line}" for line in _facts(findings)]
    lines += ["", *(dump_yaml({key: value}).strip() for key, value in values.items() if value is not None)]
    lines += [f"# {line}" for line in _suggestions(findings, values)]
    # What nodes and SLURM said must not begin a line of its own.
    return "\n".join(line if line[:1] != "#" else _one_line(line) for line in lines) + "\n"


def _values(findings: Findings) -> dict[str, Any]:
    from trainer.launch.probe import chosen_interface

    kind = findings.kind
    ranks = kind.gpus or None
    return {
        "partition": kind.partition,
        "account": findings.accounts[0] if len(findings.accounts) == 1 else None,
        "gpus_per_node": kind.gpus,
        "gres_style": findings.gres_style if kind.gpus else None,
        "gpu_type": kind.gpu_type,
        "cpus_per_task": max(1, kind.cpus // ranks) if ranks else None,
        "memory_per_node": f"{kind.memory_megabytes}M" if kind.memory_megabytes and ranks else None,
        "time": _time(kind.time_limit),
        "network_interface": chosen_interface(findings.said),
    }


def _time(limit: str) -> str:
    """Return a day, or the partition's limit where that is less."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit)
    if match is None or match[1] is not None or int(match[2] or 0) >= 24:
        return _DAY
    return limit if match[2] else f"00:{limit}"


def _facts(findings: Findings) -> list[str]:
    config, kind, said = findings.config, findings.kind, findings.said
    runtimes = [*said.get("container", ()), *(["pyxis"] if findings.has_pyxis else [])]
    shm = int(_one(said, "shm_kilobytes", "0")) // 1024
    gpus = (
        f"{kind.gpus} GPUs ({', '.join(dict.fromkeys(said.get('gpu', ())))})"
        if said.get("gpu")
        else f"{kind.gpus} GPUs"
    )
    ends = "is set" if said.get("end_time") else "is not set: scontrol is asked for the remaining time"
    return [
        f"Written by `trainer submit --probe` on {time.strftime('%Y-%m-%d')} from node {_one(said, 'host')}.",
        "A job asks for whole nodes unless the recipe says less. All keys: docs/recipe.md, launch.slurm",
        f"SLURM {config.get('SLURM_VERSION', '?')} of cluster {config.get('ClusterName', '?')}; "
        f"KillWait {config.get('KillWait', '?')}, JobRequeue {config.get('JobRequeue', '?')} (jobs ask for --requeue), "
        f"preemption {config.get('PreemptMode', '?')}",
        f"partition {kind.partition}: {kind.nodes} nodes of {kind.cpus} CPUs, {kind.memory_megabytes} MB, {gpus}; "
        f"time limit {kind.time_limit}",
        f"SLURM_JOB_END_TIME {ends}",
        f"srun --mpi: {', '.join(findings.mpi) or 'unknown'}; /dev/shm: {shm} MB",
        f"interfaces: {', '.join(row.split()[0] for row in said.get('interface', ())) or 'none with a route'}",
        f"containers: {', '.join(runtimes) or 'none found'}",
        f"directories that nodes share: {', '.join(findings.shared) or 'none of those looked at'}",
        *([f"NOT on the node: {', '.join(findings.not_shared)}"] if findings.not_shared else []),
        *(["NOT on the node: the interpreter with trainer"] if "python" not in said else []),
    ]


def _suggestions(findings: Findings, values: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    if "account" not in findings.given and len(findings.accounts) > 1:
        lines.append(f"account: {findings.accounts[0]}   # or {', '.join(findings.accounts[1:])}")
    if "signal_seconds" not in values:
        lines.append("signal_seconds: 300   # save this long before the time limit")
    if not values.get("modules") and not values.get("setup"):
        lines.append("modules: [cuda/12.4]")
        lines.append("setup: [source /path/to/venv/bin/activate]")
    return lines


def _one_line(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def _one(said: Mapping[str, Any], name: str, otherwise: str = "?") -> str:
    return said[name][0] if said.get(name) else otherwise
