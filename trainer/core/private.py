"""Who may read what a run writes: its owner, and a group where ``run.group_access`` says so. Others never.

A command that writes into a run directory sets its own umask first, whatever the user's is: so there is one switch for
all writers, libraries and child processes included. What our own code makes has its mode stated as well.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Generator
from pathlib import Path
from typing import Literal

GroupAccess = Literal["none", "read"]

_UMASKS: dict[GroupAccess, int] = {"none": 0o077, "read": 0o027}
_chosen: list[GroupAccess] = ["none"]
"""What holds for this process, innermost last. The umask can't be asked: reading it means setting it."""


def keep_private(group: GroupAccess) -> None:
    """Make everything this process and its children create from now on private, or readable for the group."""
    _chosen[:] = [group]
    os.umask(_UMASKS[group])


def directory_mode() -> int:
    """Return the mode for ``mkdir``: 0700, or 0750 where a group may read."""
    return 0o777 & ~_UMASKS[_chosen[-1]]


def file_mode() -> int:
    """Return the mode for ``os.open``: 0600, or 0640 where a group may read."""
    return 0o666 & ~_UMASKS[_chosen[-1]]


@contextlib.contextmanager
def private_like(directory: Path) -> Generator[None]:
    """Create files inside the context with the access that ``directory`` has; private where it is not there."""
    _chosen.append(group_access_of(directory))
    previous = os.umask(_UMASKS[_chosen[-1]])
    try:
        yield
    finally:
        os.umask(previous)
        _chosen.pop()


def group_access_of(directory: Path) -> GroupAccess:
    """Return whether the group may read ``directory``."""
    try:
        return "read" if directory.stat().st_mode & stat.S_IRGRP else "none"
    except OSError:
        return "none"


def make_run_directory(directory: Path, group: GroupAccess) -> None:
    """Make the run directory, or set the mode of ours. Raises OSError.

    With a group it is 2750: what is created below takes its group, and what earlier starts wrote for their owner alone
    is opened to it. One that holds other things than a run, and one of another user, keep their mode: locking them
    would lock out who works there.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    if found.st_uid != os.geteuid() or not _is_ours(directory):
        return
    mode = 0o2750 if group == "read" else 0o700
    if stat.S_IMODE(found.st_mode) == mode:
        return
    if group == "read":
        for below, directories, files in os.walk(directory):
            for name in (*directories, *files):
                with contextlib.suppress(OSError):  # it went meanwhile, or is a link
                    _open_to_group(Path(below, name), found.st_gid)
    directory.chmod(mode)  # last: a start that ended in between is repeated


def _open_to_group(path: Path, group_id: int) -> None:
    """Let the group read a file or directory of ours, whose only name this is. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        is_directory = stat.S_ISDIR(found.st_mode)
        if found.st_uid != os.geteuid() or not (is_directory or (stat.S_ISREG(found.st_mode) and found.st_nlink == 1)):
            return
        if found.st_gid != group_id:
            os.fchown(descriptor, -1, group_id)
        os.fchmod(descriptor, stat.S_IMODE(found.st_mode) | (0o2050 if is_directory else 0o040))
    finally:
        os.close(descriptor)


def _is_ours(directory: Path) -> bool:
    names = {entry.name for entry in os.scandir(directory)}
    return not names or bool(names & {"run.yaml", ".lock", "logs", "slurm", "recipe.yaml"})
