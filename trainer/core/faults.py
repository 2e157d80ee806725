"""Fault points for tests: named places where a test may kill, delay or fail a rank. Off unless a flag is set.

``TRAINER_FAULTS=point:rank:step:kind[,...]`` with ``TRAINER_ALLOW_FAULTS=1``. ``step`` or ``rank`` may be ``*``.
Kinds: ``kill`` (SIGKILL to this process), ``raise``, ``enospc`` (OSError), ``truncate`` (cut the file at hand in half,
then SIGKILL: what a kill in the middle of a write leaves behind), ``signal`` (SIGUSR1 to this rank alone), ``sleep``
(for an hour).
"""

from __future__ import annotations

import errno
import os
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
    elif kind == "enospc":
        raise OSError(errno.ENOSPC, f"injected at {point}")
    elif kind == "signal":
        os.kill(os.getpid(), signal.SIGUSR1)
    elif kind == "sleep":
        time.sleep(3600)
    else:
        raise RuntimeError(f"injected at {point}")
