"""Which file system a path lies on, and whether other hosts may write to it too."""

from __future__ import annotations

import os
from pathlib import Path

_SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse", "smb", "cifs", "9p", "panfs", "wekafs", "virtiofs", "afs")
"""How the types of file systems start that several hosts mount; of a type in none of these we know that it is local."""


def mount_of(path: Path, table: Path = Path("/proc/self/mountinfo")) -> str:
    """Return "TYPE MOUNT-POINT" of the file system that holds ``path`` or will; empty where the system doesn't tell."""
    real = os.path.realpath(path)
    found, longest = "", -1
    try:
        lines = table.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:  # proc(5): 36 35 98:0 /root /mount/point options - type source options
        left, _, right = line.partition(" - ")
        words = left.split()
        if len(words) < 5 or not right:
            continue
        point = words[4].replace("\\040", " ")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= longest:  # of two on one point the later one is seen
            found, longest = f"{right.split()[0]} {point}", len(point)
    return found


def may_be_shared(path: Path) -> bool:
    """Return whether other hosts may write to the file system of ``path``; True where that isn't known."""
    mount = mount_of(path)
    return not mount or mount.startswith(_SHARED)


def existing(path: Path) -> Path:
    """Return ``path`` or the nearest directory above it that exists."""
    absolute = path.absolute()
    return next((place for place in (absolute, *absolute.parents) if place.exists()), Path("/"))
