"""Fault points for tests: named places where a test may kill, delay or fail a rank. Off unless a flag is set.

``TRAINER_FAULTS=point:rank:step:kind[,...]`` with ``TRAINER_ALLOW_FAULTS=1``. ``step`` or ``rank`` may be ``*``.
Kinds: ``kill`` (SIGKILL to this process), ``raise``, ``enospc``, ``eio`` (OSError), ``truncate`` (cut the file at hand
in half, then SIGKILL: what a kill in the middle of a write leaves behind), ``signal`` (SIGUSR1 to this rank alone;
``sigterm`` and others likewise), ``sleep`` (for an hour), ``pause0.5`` (for half a second, or until a signal comes),
``stop`` (SIGSTOP), ``segfault``, ``exit`` (os._exit(7)), ``memory`` (ask for more than is allowed), ``flood`` (fill
memory until the system kills a process), ``lock`` (compute for ages in C code that keeps the interpreter's lock). Some
make the system itself refuse what follows: ``fill`` (fill the file system beside the file at hand, which must be a
small one), ``chmod`` (take the right to write from its directory), ``fsize`` (limit files of this process to 256 KiB)
and ``nofsize`` (no longer).
Every phase of `trainer.core.phases` is a point: ``phase.forward``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import select
import signal
import time
from pathlib import Path


def reach(point: str, *, rank: int, step: int, path: Path | None = None) -> None:
    """Do what the environment asks for at this point; normally nothing."""
    if os.environ.get("TRAINER_ALLOW_FAULTS") != "1":
        return
    for fault in filter(None, os.environ.get("TRAINER_FAULTS", "").split(",")):
        name, at_rank, at_step, kind = fault.split(":")
        if name == point and at_rank in ("*", str(rank)) and at_step in ("*", str(step)):
            _strike(kind, point, path)


def _strike(kind: str, point: str, path: Path | None) -> None:
    if kind == "truncate" and path is not None:
        os.truncate(path, path.stat().st_size // 2)
    if kind in ("kill", "truncate"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind in ("enospc", "eio"):
        number = errno.ENOSPC if kind == "enospc" else errno.EIO
        raise OSError(number, f"{os.strerror(number)}, injected at {point}")
    elif kind == "fill" and path is not None:
        _fill(path.with_name("fill"))
    elif kind == "chmod" and path is not None:
        path.parent.chmod(0o500)
    elif kind in ("fsize", "nofsize"):
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**18 if kind == "fsize" else most, most))
    elif kind == "signal":
        os.kill(os.getpid(), signal.SIGUSR1)
    elif kind.startswith("sig"):
        os.kill(os.getpid(), getattr(signal, kind.upper()))
    elif kind == "sleep":
        time.sleep(3600)
    elif kind in ("stop", "segfault"):
        os.kill(os.getpid(), signal.SIGSTOP if kind == "stop" else signal.SIGSEGV)
    elif kind == "exit":
        os._exit(7)
    elif kind == "memory":
        resource.setrlimit(resource.RLIMIT_AS, (2**26, resource.getrlimit(resource.RLIMIT_AS)[1]))
        bytearray(2**30)
    elif kind == "flood":
        filled: list[bytes] = []
        while True:
            filled.append(b"x" * 2**22)
    elif kind == "lock":
        re.match(r"(a+)+$", "a" * 64 + "b")  # backtracks for ages
    elif kind.startswith("pause"):
        _pause(float(kind.removeprefix("pause")))
    else:
        raise RuntimeError(f"injected at {point}")


def _pause(seconds: float) -> None:
    """Wait until a signal comes, which time.sleep would not end for, or so long."""
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        before = signal.set_wakeup_fd(writing)
    except ValueError:  # signals come to the main thread alone
        time.sleep(seconds)
        return
    try:
        select.select([reading], [], [], seconds)
    finally:
        signal.set_wakeup_fd(before)
        os.close(reading)
        os.close(writing)


def _fill(path: Path) -> None:
    """Write until the file system has no room left. Raises RuntimeError if it has more than 64 MiB."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        for _ in range(64 * 256):
            file.write(bytes(4096))
        raise RuntimeError(f"{path.parent} is not on a small file system")
