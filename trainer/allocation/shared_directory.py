"""Is the run directory one and the same on all nodes? Each writes a file there, all read all, a rename is seen by all.

Names are new ones: network file systems remember for seconds what was not there.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.allocation.facts import NodeFacts
from trainer.allocation.findings import Check, Finding, listed
from trainer.core.private import GroupAccess, make_run_directory

_PATIENCE_SECONDS = 3.0
_READ_AT_MOST = 64
"""Files that a node reads: those of its next neighbours. A thousand nodes would ask for a million otherwise."""
_SKEW_SECONDS = 5.0


def begin(run_directory: Path, group: GroupAccess) -> str:
    """Make a directory for the files of all nodes and return its name. Raises OSError."""
    make_run_directory(run_directory, group)
    name = f".preflight-{secrets.token_hex(8)}"
    (run_directory / name).mkdir(mode=0o700)
    return name


def write(directory: Path, node: int) -> dict[str, Any]:
    """Write this node's file.

    Returns ``error`` (empty: none), and ``skew_seconds`` from its clock to the file server's.
    """
    path = directory / f"node-{node}"
    try:
        _wait_for(directory)
        before = time.time()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(descriptor, directory.name.encode())
            os.fsync(descriptor)
            after = time.time()
            written = os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
    except OSError as error:
        return {"error": error.strerror or str(error), "missing": isinstance(error, FileNotFoundError)}
    return {"error": "", "missing": False, "skew_seconds": written - (before + after) / 2}


def rename(directory: Path) -> None:
    """Give a directory its final name, as a checkpoint is committed. Raises OSError."""
    (directory / ".commit.tmp").mkdir(mode=0o700)
    (directory / ".commit.tmp" / "file").write_text(directory.name)
    (directory / ".commit.tmp").rename(directory / "commit")


def read(directory: Path, node: int, nodes: int) -> dict[str, Any]:
    """Return which nodes' files are not seen here (``unseen``), and whether the rename is (``renamed``)."""
    others = [(node + distance) % nodes for distance in range(min(nodes, _READ_AT_MOST))]
    unseen = [other for other in others if not _holds(directory / f"node-{other}", directory.name)]
    return {"unseen": unseen, "renamed": _holds(directory / "commit" / "file", directory.name)}


def clean(directory: Path) -> None:
    """Delete what was written; what is left over is small and private."""
    shutil.rmtree(directory, ignore_errors=True)


def judge(
    run_directory: str, hosts: Sequence[str], written: Sequence[Mapping[str, Any]], seen: Sequence[Mapping[str, Any]],
    nodes: Mapping[str, NodeFacts],
) -> Check:  # fmt: skip
    """Return the check of what each node wrote and saw, in the order of ``hosts``; the first is that of rank 0."""
    findings: list[Finding] = []
    blind = [host for host, result in zip(hosts, written, strict=True) if result["missing"]]
    refused = {host: result["error"] for host, result in zip(hosts, written, strict=True) if result["error"]}
    if blind:
        findings.append(_not_shared(run_directory, blind, hosts, nodes))
    for host in [host for host in refused if host not in blind]:
        text = f"{host} can't write into {run_directory}: {refused[host]}"
        findings.append(Finding("node", text, "mount it there for writing", (host,), "disk"))
    sound = [host for host in hosts if host not in refused]
    for host, result in zip(hosts, seen, strict=True):
        numbers: list[int] = result["unseen"]
        unseen = [hosts[number] for number in numbers if hosts[number] in sound] if host in sound else []
        if unseen:
            text = f"{host} does not see what {listed(unseen)} wrote in {run_directory}"
            findings.append(Finding("node", text, "look at the mount of that file system there", (host,), "disk"))
        elif host in sound and not result["renamed"]:
            text = f"{host} does not see in {run_directory} that a directory was renamed"
            findings.append(Finding("node", text, "mount it with a shorter attribute cache", (host,), "disk"))
    skews = {h: float(result.get("skew_seconds", 0.0)) for h, result in zip(hosts, written, strict=True)}
    late = [host for host, skew in skews.items() if abs(skew) > _SKEW_SECONDS]
    if late:
        text = f"the clock of {listed(late)} is {skews[late[0]]:+.0f} s from that of the file server"
        findings.append(Finding("note", text, "let the site set its clock (NTP)"))
    worst = max((abs(skew) for skew in skews.values()), default=0.0)
    summary = f"shared by {len(hosts)} node{'s' if len(hosts) > 1 else ''}, clocks within {max(worst, 0.01):.2f} s"
    return Check("run directory", summary, tuple(findings))


def _not_shared(run: str, blind: list[str], hosts: Sequence[str], nodes: Mapping[str, NodeFacts]) -> Finding:
    """Tell a mount that one node lacks from a directory that no node shares."""
    mounts = {host: nodes[host].mount for host in hosts if host in nodes}
    common = max(mounts.values(), key=list(mounts.values()).count, default="")
    odd = tuple(host for host, mount in mounts.items() if mount != common)
    text = f"{run} is not shared: {listed(blind)} do{'es' if len(blind) == 1 else ''} not see what {hosts[0]} wrote"
    if odd:
        there = mounts[odd[0]] or "another file system"
        return Finding("node", f"{text} ({there} on {listed(odd)})", "mount the same file system there", odd, "disk")
    return Finding("environment", f"{text} ({common} on all)", "choose a run.directory on a file system of all nodes")


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)


def _holds(path: Path, text: str) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            if path.read_text() == text:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
