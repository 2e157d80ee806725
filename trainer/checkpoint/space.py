"""Is there room for a checkpoint? Asked before anything is written."""

from __future__ import annotations

import os
from pathlib import Path

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
