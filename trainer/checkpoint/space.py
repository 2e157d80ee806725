"""Is there room for a checkpoint, on disk and in memory? Asked before anything is written."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from trainer.core.units import format_bytes

_SPARE = 1.05
"""A little more than the files: manifests, blocks, what others write meanwhile."""


def lacks_space(directory: Path, num_bytes: int, num_files: int) -> str | None:
    """Return what the file system of ``directory`` lacks for so many bytes and files, None if it has room.

    File systems that don't tell their inodes are trusted. Raises OSError.
    """
    found = os.statvfs(directory)
    free = found.f_bavail * found.f_frsize
    if free < num_bytes * _SPARE:
        return f"{directory} has {format_bytes(free)} free and needs {format_bytes(num_bytes)}"
    if found.f_files and found.f_favail < num_files + 8:
        return f"{directory} has {found.f_favail} inodes free and needs {num_files + 8}"
    return None


def free_memory_bytes(cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Return what this process and its neighbours may still allocate: the host's memory, or what a job is limited to.

    SLURM and containers limit memory by control groups (version 2, or 1), each group within the ones above it.
    """
    free = psutil.virtual_memory().available
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return free
    for _, controllers, name in (line for line in lines if len(line) == 3):
        if controllers == "":
            root, limit, used, inactive = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            inactive = "total_inactive_file"
        else:
            continue
        group = root / name.lstrip("/")
        for level in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
            free = min(free, _left(level, limit, used, inactive, free))
    return free


def _left(group: Path, limit: str, used: str, inactive: str, otherwise: int) -> int:
    """Return what a control group may still use, unused pages of files included; ``otherwise`` without a limit."""
    try:
        most = int((group / limit).read_text())  # "max": none
        now = int((group / used).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, most - now + int(statistics.get(inactive, 0)))
    except (OSError, ValueError):
        return otherwise
