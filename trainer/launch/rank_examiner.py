"""Look at a rank from outside: /proc, the board it writes on, the Python stacks of its threads, the end of its log."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.core.environ import RankEnvironment
from trainer.core.logs import rank_log_path
from trainer.core.phases import Board, Raised, Snapshot
from trainer.core.redact import redacted_text
from trainer.resilience.rank_report import Event, RankReport

STACKS_SIGNAL = signal.SIGRTMAX - 3
"""Asks a rank for its stacks: no library in a training process uses it."""
LOCK_SECONDS = 5.0
"""A rank whose heartbeat thread has not run for so long does not run Python code at all."""
_STACKS_SECONDS = 2.0
_LOG_BYTES = 4096


@dataclass(frozen=True)
class Place:
    """A rank as its supervisor knows it."""

    ranks: RankEnvironment
    host: str
    launch: str
    run_directory: Path


class Examiner:
    """Made before the rank is forked, which answers for its stacks from its first moment; `attach` in its supervisor.

    It answers also while C code holds the interpreter's lock, and when it crashes.
    """

    def __init__(self, board: Board, place: Place) -> None:
        self._board, self._place = board, place
        self._stacks = os.memfd_create("stacks")
        self._pid = 0
        self._oom_kills = oom_kills()
        # Inherited: a rank that is asked before it could install a handler would die of the signal.
        faulthandler.enable(file=self._stacks, all_threads=True)
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True, chain=False)

    def attach(self, pid: int) -> None:
        """Note the process of the rank."""
        self._pid = pid
        faulthandler.disable()
        faulthandler.unregister(STACKS_SIGNAL)

    def state(self) -> str:
        """Return the process's state as /proc has it (R, S, D, T, Z...), empty if it is gone."""
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{self._pid}/stat").read_text(errors="replace")
            return text.rpartition(")")[2].split()[0]
        return ""

    def stacks(self, *, ask: bool, pause: Callable[[float], None] = time.sleep) -> str:
        """Return the stacks that the rank wrote: in a crash, or because it is asked to now. A stopped one goes on.

        ``pause`` is how to wait for so many seconds.
        """
        if ask:
            before = self._written()
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, STACKS_SIGNAL)  # before it goes on: pending, it is what it does first
                os.kill(self._pid, signal.SIGCONT)
            end, seen = time.monotonic() + _STACKS_SECONDS, before
            while time.monotonic() < end:
                pause(0.1)
                now = self._written()
                if now > before and now == seen:
                    break
                seen = now
            return os.pread(self._stacks, self._written() - before, before).decode(errors="replace")
        return os.pread(self._stacks, self._written(), 0).decode(errors="replace")

    def report(
        self,
        event: Event,
        snapshot: Snapshot,
        *,
        state: str = "",
        stalled_seconds: float = 0.0,
        ended: int | None = None,
        log_tail: str = "",
    ) -> RankReport:
        """Return what there is to say; ``ended`` is the exit code, negative for a signal.

        Touches no file but those of /proc and /sys: ``log_tail`` is for the caller to read.
        """
        place, call, raised = self._place, snapshot.collective, snapshot.raised
        silent = time.monotonic() - snapshot.ticked_at if snapshot.ticked_at else 0.0
        return RankReport(
            rank=place.ranks.rank,
            world_size=place.ranks.world_size,
            node_rank=place.ranks.node_rank,
            host=place.host,
            launch=place.launch,
            event=event,
            time_unix=time.time(),
            phase=snapshot.phase,
            step=snapshot.step,
            micro_batch=snapshot.micro_batch,
            detail=snapshot.detail,
            reading=snapshot.reading,
            collective_name=call.name if call else "",
            collective_group=call.group if call else "",
            collective_number=call.number if call else 0,
            collective_elements=call.elements if call else 0,
            in_collective=call.inside if call else False,
            stalled_seconds=stalled_seconds,
            process_state=state,
            lock_held=ended is None and state in ("R", "S", "D") and silent > LOCK_SECONDS,
            exit_code=_exit_code(ended, raised),
            signal=signal_name(-ended) if ended is not None and ended < 0 else "",
            out_of_memory=ended is not None and oom_kills() > self._oom_kills,
            exception_type=raised.type if raised else "",
            exception_message=redacted_text(raised.message) if raised else "",
            exception_unix=raised.time_unix if raised else 0.0,
            blamed_ranks=tuple(map(str, raised.blamed_ranks)) if raised else (),
            blamed_hosts=raised.blamed_hosts if raised else (),
            log_tail=log_tail,
        )

    def _written(self) -> int:
        return os.fstat(self._stacks).st_size

    def log_tail(self) -> str:
        """Return the end of the rank's log, of this start alone."""
        with (
            contextlib.suppress(OSError),
            rank_log_path(self._place.run_directory, self._place.ranks.rank).open("rb") as log,
        ):
            log.seek(max(0, os.fstat(log.fileno()).st_size - _LOG_BYTES))
            text = log.read(_LOG_BYTES).decode(errors="replace")
            return redacted_text(text.rpartition("==== start ")[2] if "==== start " in text else text)
        return ""


def _exit_code(ended: int | None, raised: Raised | None) -> int | None:
    if ended is None:
        return raised.exit_code if raised is not None else None
    return ended if ended >= 0 else None


def signal_name(number: int) -> str:
    """Return "SIGKILL", or "signal 40"."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def oom_kills(cgroups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many processes the system has killed for want of memory: in this cgroup, or if unknown on the host."""
    with contextlib.suppress(OSError):
        for line in cgroups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":  # version 2
                counted = _count(mount / path.lstrip("/") / "memory.events", "oom_kill")
            elif "memory" in controllers.split(","):
                counted = _count(mount / "memory" / path.lstrip("/") / "memory.oom_control", "oom_kill")
            else:
                continue
            if counted is not None:
                return counted
    return _count(Path("/proc/vmstat"), "oom_kill") or 0


def _count(path: Path, name: str) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return None
