"""Who trains in a run directory: a lock held for as long as rank 0 lives, gone with it however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from trainer.core.errors import Problem, RefusedError
from trainer.core.private import file_mode


def _path(run_directory: Path) -> Path:
    return run_directory / ".lock"


def holder(run_directory: Path) -> str | None:
    """Return who holds the directory ("pid 17 on node3"), None if nobody does that this host can see.

    File systems that do not share locks between hosts show only the holders of this one.
    """
    try:
        descriptor = os.open(_path(run_directory), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "unknown"
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(descriptor)
    return None


def refuse_if_held(run_directory: Path) -> None:
    """Raise RefusedError if another process is training in the directory."""
    owner = holder(run_directory)
    if owner is not None:
        raise _held(run_directory, owner)


class RunLock:
    """Holds a run directory until released or until the process ends."""

    def __init__(self, run_directory: Path) -> None:
        """Take the lock. Raises RefusedError if another process has it."""
        self._descriptor = os.open(_path(run_directory), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, file_mode())
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(self._descriptor, 200, 0).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise _held(run_directory, owner or "unknown") from error
        os.truncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def release(self) -> None:
        """Let the next job in."""
        with contextlib.suppress(OSError):
            os.close(self._descriptor)


def _held(run_directory: Path, owner: str) -> RefusedError:
    rule = f"another job is training here ({owner})"
    return RefusedError(
        Problem("run.directory", str(run_directory), rule, "wait for it, stop it, or use another run.directory")
    )
