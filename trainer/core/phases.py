"""What a rank is doing, in memory that another process can read: phase, step, file at hand, last collective, exception.

The rank writes into an anonymous shared mapping that was made before it was forked; its supervisor
(`trainer.launch.supervisor`) reads. Writing takes no system call and no lock, so that it can be done for every
micro-batch, and what was written last is still there when the rank is stopped, killed or stuck in C.
"""

from __future__ import annotations

import mmap
import resource
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from trainer.core import faults
from trainer.core.errors import EXIT_FAILURE

Phase = Literal["start", "load", "data", "forward", "backward", "optimizer", "log", "evaluate", "save", "stop"]
_PHASES: tuple[Phase, ...] = get_args(Phase)
STEP_PHASES: frozenset[Phase] = frozenset({"data", "forward", "backward", "optimizer", "log"})
"""Those whose time is known from the steps before."""

_RECENT_STEPS = 16
_MOST_BLAMED = 16
_SLOWER = 3.0
"""A save or evaluation may take so many times as long as the longest so far."""
_BEAT_SECONDS = 1.0
_LATE_SECONDS = 1.5
"""So much later than meant, the heartbeat looks for what held it up."""
_GIL_SHARE = 0.1
"""Of the time of its delay, at least, the heartbeat was waiting for the GIL; otherwise it was suspended."""

_Call = tuple[float, float, bytes, bytes, int, int]


class _Section:
    """A record that is written in one call and read without a lock.

    The same number stands before and after the values; a reader takes what it saw twice, with both numbers equal.
    """

    def __init__(self, values: str, offset: int) -> None:
        self._struct = struct.Struct(f"=Q{values}Q")
        self._offset, self._number = offset, 0
        self.end = offset + self._struct.size

    def write(self, memory: mmap.mmap, *values: Any) -> None:
        self._number += 1
        self._struct.pack_into(memory, self._offset, self._number, *values, self._number)

    def read(self, memory: mmap.mmap) -> tuple[Any, ...] | None:
        """Return the values, None if nothing has been written (or a writer died in the middle)."""
        before = b""
        for _ in range(1000):
            content = memory[self._offset : self.end]
            first, *values, last = self._struct.unpack(content)
            if content == before and first == last:
                return tuple(values) if first else None
            before = content
        return None


@dataclass(frozen=True)
class Collective:
    """The last collective that a rank entered."""

    name: str
    group: str
    number: int
    """Counted from 1 in this group."""
    elements: int
    inside: bool
    """False: the call has returned. On GPUs that only means that it was queued."""


@dataclass(frozen=True)
class Raised:
    """The exception that ended a rank."""

    type: str
    message: str
    traceback: str
    time_unix: float
    blamed_ranks: tuple[int, ...]
    """Those that the exception says are at fault; empty: the one that raised it."""
    blamed_hosts: tuple[str, ...]
    """Hosts that it says are not to be trusted."""
    told: bool
    """Whether the rank tells the user by itself, in words that are meant for him."""
    exit_code: int
    """That the rank means to end with; what it does until then may hang."""


@dataclass(frozen=True)
class Snapshot:
    """What a rank was last doing."""

    phase: Phase
    step: int
    micro_batch: int
    """Counted from 0; -1 where the phase has none."""
    detail: str
    reading: str
    """The file that is being read just now, empty if none is."""
    collective: Collective | None
    raised: Raised | None
    changed_at: float
    """time.monotonic() of the last sign of progress."""
    allowed_seconds: float
    """That this phase may take without one."""
    ticked_at: float
    """time.monotonic() when Python code last ran in a thread beside; 0 before the first time."""
    started: bool
    """Whether the run's status is this start's."""


class Board:
    """The shared memory, and the writer's knowledge of how long phases take."""

    def __init__(self, start_seconds: float = 1800.0, slow_seconds: float = 300.0) -> None:
        """``start_seconds`` is allowed where nothing is known yet, ``slow_seconds`` at least outside of steps."""
        self._memory = mmap.mmap(-1, 16384)  # anonymous and shared
        self._progress = _Section("dIqid192s", 0)
        self._collective = _Section("d48s64sQQ?", self._progress.end)
        self._reading = _Section("d256s", self._collective.end)
        self._raised = _Section("d128s2048s6144s512s512s?i", self._reading.end)
        self._tick = _Section("d?", self._raised.end)
        self._start_seconds, self._slow_seconds = start_seconds, slow_seconds
        self._longest: dict[Phase, float] = {}
        self._steps: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._step_seconds = 0.0
        self._entered_at = time.monotonic()
        """As `working_seconds` counts."""
        self._phase: Phase = "start"
        self._step, self._rank = 0, 0
        self._started = False
        self._beating = False
        self._beat_at = 0.0
        self._suspended_seconds = 0.0
        self._numbers: dict[str, int] = {}
        self.waited_seconds = 0.0
        """Spent inside collectives of steps since the start. On GPUs they return before they are done."""
        self.quiet_threads: set[int] = set()
        """Threads whose collectives say nothing of the training loop."""
        self.advances_beside = 0
        """Signs of progress of those threads: chunks that they have written."""
        self.mark("start")

    def beat(self, rank: int) -> None:
        """Run a thread that shows once a second that Python code can run. To be called in the rank."""
        self._rank, self._beating, self._beat_at = rank, True, time.monotonic()
        self._beat_once()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def working_seconds(self) -> float:
        """Return time.monotonic() less the time that this process was suspended: what steps are measured by."""
        if self._beating:
            for _ in range(100):  # it has just gone on: the heartbeat must say for how long it had not
                if time.monotonic() - self._beat_at <= _BEAT_SECONDS + _LATE_SECONDS:
                    break
                time.sleep(0.001)
        return time.monotonic() - self._suspended_seconds

    def note_started(self) -> None:
        """Say that status.json is this start's from now on."""
        self._started = True
        self._beat_once()

    def mark(
        self,
        phase: Phase,
        *,
        step: int | None = None,
        micro_batch: int = -1,
        detail: str = "",
        allowed_seconds: float | None = None,
    ) -> None:
        """Say what begins now; ``allowed_seconds`` is that until the next word, where it can be known."""
        self._measure(phase, self.working_seconds())
        if step is not None:
            self._step = step
        allowed = self._allowed(phase) if allowed_seconds is None else allowed_seconds
        self._marked = (_PHASES.index(phase), self._step, micro_batch, allowed, detail.encode()[:192])
        self._progress.write(self._memory, time.monotonic(), *self._marked)
        if self._beating:
            faults.reach(f"phase.{phase}", rank=self._rank, step=self._step)

    def advance(self) -> None:
        """Say that what was marked last takes long and moves on: a chunk was written, a file or block was checked.

        On a quiet thread only count it: whoever waits for that thread tells (`mark` and this have one writer).
        """
        if self.quiet_threads and threading.get_ident() in self.quiet_threads:
            self.advances_beside += 1
        else:
            self._progress.write(self._memory, time.monotonic(), *self._marked)

    def patience(self, longest_seconds: float) -> float:
        """Return what is allowed where so long was the longest so far, 0 if there was none."""
        return max(self._start_seconds, _SLOWER * longest_seconds)

    def enter(self, name: str, group: str, elements: int) -> _Call | None:
        """Note that a collective begins; give what is returned to `leave`."""
        if self.quiet_threads and threading.get_ident() in self.quiet_threads:
            return None
        number = self._numbers[group] = self._numbers.get(group, 0) + 1
        call = (self.working_seconds(), time.monotonic(), name.encode(), group.encode(), number, elements)
        self._collective.write(self._memory, *call[1:], True)
        return call

    def leave(self, call: _Call | None) -> None:
        """Note that it has returned."""
        if call is not None:
            if self._phase in STEP_PHASES:
                self.waited_seconds += self.working_seconds() - call[0]
            self._collective.write(self._memory, time.monotonic(), *call[2:], False)

    def read_begins(self, path: str) -> None:
        """Note that a file is being read, in whatever thread."""
        self._reading.write(self._memory, time.monotonic(), path.encode(errors="surrogateescape")[-256:])

    def read_ends(self) -> None:
        """Note that it has been."""
        self._reading.write(self._memory, time.monotonic(), b"")

    def note_exception(
        self,
        error: BaseException,
        traceback: str,
        *,
        told: bool,
        blamed_ranks: Sequence[int] = (),
        blamed_hosts: Sequence[str] = (),
        exit_code: int = EXIT_FAILURE,
    ) -> None:
        """Note what ends this rank. The first one counts: later ones are its consequences."""
        if self._raised.read(self._memory) is not None:
            return
        name, text = type(error).__name__.encode()[:128], str(error).encode(errors="replace")[:2048]
        ranks = ",".join(map(str, blamed_ranks[:_MOST_BLAMED])).encode()
        hosts = ",".join(blamed_hosts[:_MOST_BLAMED]).encode()[:512]
        trace = traceback.encode(errors="replace")[-6144:]
        self._raised.write(self._memory, time.time(), name, text, trace, ranks, hosts, told, exit_code)

    def snapshot(self) -> Snapshot:
        """Return what was last written; to be called by the reader."""
        progress = self._progress.read(self._memory) or (0.0, 0, 0, -1, self._start_seconds, b"")
        changed_at, place, step, micro_batch, allowed, detail = progress
        collective, reading = self._collective.read(self._memory), self._reading.read(self._memory)
        raised, tick = self._raised.read(self._memory), self._tick.read(self._memory) or (0.0, False)
        if collective is not None:
            changed_at = max(changed_at, collective[0])
        if reading is not None and _PHASES[place] == "data":  # a thread reads ahead, no further than it may
            changed_at = max(changed_at, reading[0])
        return Snapshot(
            phase=_PHASES[place],
            step=step,
            micro_batch=micro_batch,
            detail=_text(detail),
            reading=_text(reading[1]) if reading else "",
            collective=Collective(_text(collective[1]), _text(collective[2]), *collective[3:]) if collective else None,
            raised=_raised(*raised) if raised else None,
            changed_at=changed_at,
            allowed_seconds=allowed,
            ticked_at=tick[0],
            started=tick[1],
        )

    def _measure(self, phase: Phase, now: float) -> None:
        """Add the time of the phase that ends to what is known."""
        seconds, before = now - self._entered_at, self._phase
        if before in STEP_PHASES:
            self._step_seconds += seconds
        elif phase != before:
            self._longest[before] = max(self._longest.get(before, 0.0), seconds)
        if phase == "data" and before != "data" and self._step_seconds:
            self._steps.append(self._step_seconds)
            self._step_seconds = 0.0
        if phase != before or before in STEP_PHASES:
            self._entered_at, self._phase = now, phase

    def _allowed(self, phase: Phase) -> float:
        if phase in STEP_PHASES:
            return max(self._steps) if self._steps else self._start_seconds
        if phase in ("evaluate", "save") and phase in self._longest:
            return max(self._slow_seconds, _SLOWER * self._longest[phase])
        return self._slow_seconds if phase == "stop" else self._start_seconds

    def _beat(self) -> None:
        switches = _waits()
        while True:
            time.sleep(_BEAT_SECONDS)
            now, before = time.monotonic(), switches
            switches = _waits()
            late = now - self._beat_at - _BEAT_SECONDS
            if late > _LATE_SECONDS and not _waited_for_gil(late, switches - before):
                self._suspended_seconds += late
            self._beat_at = now
            self._beat_once()

    def _beat_once(self) -> None:
        self._tick.write(self._memory, time.monotonic(), self._started)


def _waits() -> int:
    """Return how often this thread has waited for something so far."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw if sys.platform == "linux" else 0


def _waited_for_gil(seconds: float, waits: int) -> bool:
    """Return whether a thread that has waited so often was kept by the GIL, as by a long call in C.

    Who wants it looks again after each switch interval (5 ms); a suspended process does nothing at all. Neither CPU
    time nor what the other threads do can tell: C may hold the GIL and sleep, and many threads compute before a stop.
    """
    return sys.platform != "linux" or waits * sys.getswitchinterval() > _GIL_SHARE * seconds


def _raised(
    at: float, name: bytes, text: bytes, trace: bytes, ranks: bytes, hosts: bytes, told: bool, code: int
) -> Raised:  # fmt: skip
    blamed = tuple(int(rank) for rank in _text(ranks).split(",") if rank)
    suspects = tuple(host for host in _text(hosts).split(",") if host)
    return Raised(_text(name), _text(text), _text(trace), at, blamed, suspects, told, code)


def _text(content: bytes) -> str:
    return content.rstrip(b"\0").decode(errors="replace")


board = Board()
"""This process's. One a process, like its log: every layer says what it does, and nobody has to hand it down."""


def new_board(start_seconds: float, slow_seconds: float) -> Board:
    """Replace this process's board by a fresh one and return it; before the rank is forked."""
    global board
    board = Board(start_seconds, slow_seconds)
    return board


def working_seconds() -> float:
    """Return the clock that stands still while this process is suspended."""
    return board.working_seconds()


def mark(phase: Phase, *, step: int | None = None, micro_batch: int = -1, detail: str = "") -> None:
    """Say what begins now, on this process's board."""
    board.mark(phase, step=step, micro_batch=micro_batch, detail=detail)
