"""Survive a compilation of DeepSpeed's operations that was killed (torch 2.13).

torch keeps others out of a build by a file's existence: a builder that is killed leaves it, and every later start waits
for ever (https://github.com/pytorch/pytorch/issues/189245). A lock of ours goes with its process.
Tests: tests/distributed/test_nvme.py, tests/distributed/test_build_lock.py.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.utils import cpp_extension

from trainer.core.errors import Problem, RefusedError
from trainer.core.mounts import may_be_shared
from trainer.core.run_lock import RunLock, holder

_RETRY_SECONDS = 0.5
FOREIGN_SECONDS = 600.0
"""A builder that is not ours may work on another host: it counts as dead when nothing has changed for so long. One
compilation, which changes nothing until it ends, takes minutes."""


@contextlib.contextmanager
def building(name: str, say: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Be alone in building or loading operation ``name``, among all hosts; clear away a dead builder's file.

    Waits while another of our processes builds. Raises RefusedError if others can write where operations are kept, and
    so could have their code run.
    """
    directory = Path(cpp_extension._get_build_directory(name, verbose=False))
    refuse_unless_private(directory.parent)
    lock = _lock(directory, say)
    try:
        clear_dead(directory / "lock", say)
        yield
    finally:
        lock.release()


def _lock(directory: Path, say: Callable[[str], None]) -> RunLock:
    waiting = False
    while True:
        try:
            return RunLock(directory, say=say)
        except RefusedError:
            owner = holder(directory, watch=False)
            if owner is None and not (directory / ".lock").is_file():
                raise  # something else is in the lock's place
            if not waiting:
                say(f"waiting for {owner or 'another process'}, which builds {directory.name}")
            waiting = True
            time.sleep(_RETRY_SECONDS)


def refuse_unless_private(root: Path) -> None:
    """Make ``root``, where built operations lie, and raise RefusedError if others than the user and root can write."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = root.stat()
    if found.st_uid not in (os.geteuid(), 0) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        rule = "others can write there, so that their code could be loaded"
        fix = "chmod go-w it if it is yours, or set TORCH_EXTENSIONS_DIR to a directory of your own"
        raise RefusedError(Problem("TORCH_EXTENSIONS_DIR", str(root), rule, fix))
    if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) != 0o700:
        root.chmod(0o700)


def clear_dead(baton: Path, say: Callable[[str], None] = lambda _: None, seconds: float = FOREIGN_SECONDS) -> None:
    """Delete torch's lock file once nobody builds; return when it is gone.

    A builder holds it open, which is seen on this host. On a file system that other hosts write to as well, nothing in
    the directory may have changed for ``seconds``, by the clock of the file server.
    """
    told = False
    while baton.exists():
        owner = _who_has_open(baton)
        if owner is None and (not may_be_shared(baton) or _unchanged_seconds(baton.parent) > seconds):
            baton.unlink(missing_ok=True)
            say(f"removed {baton}: its builder died")
            return
        if not told:
            who = f"pid {owner}" if owner is not None else f"a builder on another host, for {seconds:.0f} s at most"
            say(f"{baton} is there: waiting for {who}")
            told = True
        time.sleep(_RETRY_SECONDS)


def _who_has_open(path: Path) -> int | None:
    """Return a process of this host that holds ``path`` open, None if none that we may look into does."""
    with contextlib.suppress(OSError):
        wanted = path.stat()
        for directory in Path("/proc").glob("[0-9]*/fd"):
            with contextlib.suppress(OSError):  # it ended, or is another user's
                for descriptor in directory.iterdir():
                    with contextlib.suppress(OSError):
                        if os.path.samestat(descriptor.stat(), wanted):
                            return int(directory.parent.name)
    return None


def _unchanged_seconds(directory: Path) -> float:
    """Return since when nothing in ``directory`` has changed, but for our own lock."""
    probe = directory / f".clock-{os.getpid()}"
    try:
        probe.touch()
        now = probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
    newest = 0.0
    for path in directory.iterdir():
        if not path.name.startswith("."):
            with contextlib.suppress(OSError):
                newest = max(newest, path.lstat().st_mtime)
    return now - newest
