"""RUN/slurm/excluded_nodes.json: nodes that a run failed on, left out of its next attempts for some hours."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from trainer.core.durable import replace_text
from trainer.launch.slurm_commands import JobFacts, Node
from trainer.launch.submit import made_slurm_directory, slurm_directory

EXCLUDED_SECONDS = 12 * 3600.0
"""How long after its last failure a node is left out: time to mend or drain it, or to see that it was not the node."""
_NAME = "excluded_nodes.json"
_VERSION = 1
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,200}")


@dataclass(frozen=True)
class ExcludedNode:
    """A node that a run failed on."""

    host: str
    count: int
    """Failures."""
    reason: str
    """Of the last one."""
    job: str
    time_unix: float


def note_suspects(run_directory: Path, suspects: dict[str, str], job: str) -> None:
    """Write down the hosts ``suspects``, each with what happened there. Raises OSError."""
    if not suspects:
        return
    known = {node.host: node for node in read(run_directory)}
    for host, reason in suspects.items():
        if _HOST.fullmatch(host):
            before = known[host].count if host in known else 0
            known[host] = ExcludedNode(host, before + 1, reason, job, time.time())
    directory = made_slurm_directory(run_directory)
    content = {"version": _VERSION, "nodes": [asdict(node) for node in known.values()]}
    replace_text(directory / _NAME, json.dumps(content, indent=2) + "\n")


def read(run_directory: Path) -> list[ExcludedNode]:
    """Return every node that was ever written down; empty where the file is missing or damaged."""
    try:
        content: object = json.loads((slurm_directory(run_directory) / _NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    nodes = cast("dict[str, object]", content).get("nodes") if isinstance(content, dict) else None
    found = [_parse(node) for node in cast("list[object]", nodes)] if isinstance(nodes, list) else []
    return [node for node in found if node is not None]


def _parse(content: object) -> ExcludedNode | None:
    if not isinstance(content, dict):
        return None
    fields = cast("dict[str, Any]", content)
    host, count, at = fields.get("host"), fields.get("count"), fields.get("time_unix")
    # The host becomes part of a command line.
    if not isinstance(host, str) or _HOST.fullmatch(host) is None:
        return None
    if not isinstance(count, int) or not isinstance(at, int | float):
        return None
    return ExcludedNode(host, count, str(fields.get("reason", "")), str(fields.get("job", "")), float(at))


def excluded_now(run_directory: Path, maximum: int) -> list[str]:
    """Return the hosts that the next attempt should avoid: the ``maximum`` that failed last, in the last hours."""
    since = time.time() - EXCLUDED_SECONDS
    newest_first = sorted(read(run_directory), key=lambda node: node.time_unix, reverse=True)
    return [node.host for node in newest_first if node.time_unix >= since][:maximum]


def merged(own: Sequence[str], active: Sequence[str]) -> list[str]:
    """Return what a job should avoid: what its user named, then ``active``."""
    return [*own, *(host for host in active if host not in own)]


def that_leave_room(active: Sequence[str], job: JobFacts, own: Collection[str], nodes: Sequence[Node]) -> list[str]:
    """Return the first of ``active`` (newest failure first) without which the job could still run on ``nodes``.

    Where the job has a constraint other than "a" or "a&b", a reservation or nodes that it must have, it can't be told
    which nodes would do: none are left out.
    """
    if job.bound or re.fullmatch(r"[\w&-]*", job.features) is None:
        return []
    wanted = frozenset(filter(None, job.features.split("&")))
    fit = {node.name for node in nodes if node.usable and wanted <= node.features and node.holds(job)} - set(own)
    kept: list[str] = []
    for host in active:
        # A node that SLURM doesn't use anyway takes no room.
        if host not in fit or len(fit - {*kept, host}) >= job.nodes:
            kept.append(host)
    return kept
