"""Start ranks on this machine, pass signals on, and turn their ends into one exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from types import FrameType

from trainer.core.environ import PARENT_VARIABLE, RankEnvironment, export
from trainer.core.errors import EXIT_DO_NOT_RESTART, EXIT_FAILURE, EXIT_OK, EXIT_REFUSED, EXIT_REQUEUE
from trainer.launch.ports import free_port

FORWARDED = (
    # The ranks have a session of their own: the terminal's Ctrl-C and hang-up reach the launcher only. Every rank
    # answers by saving, and status.json says whether it was a person who asked.
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
"""What is passed on, here and to other hosts."""
_SAME_SIGNAL_SECONDS = {signal.SIGINT: 0.1, signal.SIGTERM: 0.5}
"""A repeat within this time is the same request: process managers and SLURM deliver one stop several times."""
_POLL_SECONDS = 0.05


@dataclass
class _Rank:
    """One child process and why it ended, if we made it end."""

    number: int
    process: subprocess.Popen[bytes]
    told: set[signal.Signals] = field(default_factory=set[signal.Signals])
    ended: bool = False
    killed_by: signal.Signals | None = None
    unexpected_signal: signal.Signals | None = None
    """The signal that killed the rank, unless it was one of ours."""

    def tell(self, signum: signal.Signals) -> None:
        """Signal the rank itself. Not its group: data workers must live until the rank has saved."""
        self.told.add(signum)
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signum)

    def kill(self) -> None:
        """Kill the rank and every process it started: its session is its process group."""
        self.told.add(signal.SIGKILL)
        self.sweep()

    def sweep(self) -> None:
        """Kill what is in the rank's group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def note_end(self, code: int) -> None:
        # At once, while the number of the group can't have been given to anybody else.
        self.sweep()
        self.ended = True
        if code < 0:
            self.killed_by = signal.Signals(-code)
            self.unexpected_signal = self.killed_by if self.killed_by not in self.told else None


def run_local(
    command: list[str],
    processes: int,
    *,
    environment: Mapping[str, str] | None = None,
    grace_seconds: float = 5.0,
    say: Callable[[str], None] | None = None,
    place: Callable[[int], RankEnvironment] | None = None,
) -> int:
    """Run ``command`` as ``processes`` ranks on this machine and return the exit code of the whole.

    Each rank gets its place by environment variables (`trainer.core.environ.export`), its own session, and our stdout
    and stderr. The first stop signal is passed on, so that the ranks save and exit 75; a second SIGINT or SIGTERM kills
    them. When a rank fails, the others get ``grace_seconds`` to notice by themselves, then SIGTERM, and as long again
    before SIGKILL. ``place`` gives the place of a local rank where there are ranks on other hosts too. Must be called
    from the main thread (signals, and PR_SET_PDEATHSIG is bound to the thread).

    Returns 0 when every rank did, 93 or 2 when a rank did, 75 when the ranks that ended by themselves said 0 or 75 and
    at least one said 75, 128 + signal when the ranks died of the user's signal, 1 for everything else.
    """
    launcher = _Launcher(grace_seconds, say or _say_on_stderr)
    place = place or _alone(processes)
    with launcher.signals_caught():
        try:
            launcher.start(command, processes, dict(os.environ if environment is None else environment), place)
            launcher.watch()
        finally:
            launcher.kill_all()
    return launcher.exit_code()


def _alone(processes: int) -> Callable[[int], RankEnvironment]:
    port = free_port("127.0.0.1")
    return lambda rank: RankEnvironment(rank, processes, rank, processes, 0, "127.0.0.1", port, "local")


def _say_on_stderr(text: str) -> None:
    print(f"trainer: {text}", file=sys.stderr, flush=True)


class _Launcher:
    def __init__(self, grace_seconds: float, say: Callable[[str], None]) -> None:
        self.ranks: list[_Rank] = []
        self.grace_seconds = grace_seconds
        self.say = say
        self.pending: list[tuple[signal.Signals, float]] = []
        self.last_stop: tuple[signal.Signals, float] | None = None
        self.forwarded: set[signal.Signals] = set()
        self.first_signal: signal.Signals | None = None
        self.aborted_by: signal.Signals | None = None
        self.failed_at: float | None = None
        self.tolerates_repeats = False
        self.incomplete = False

    @contextlib.contextmanager
    def signals_caught(self) -> Generator[None]:
        """Note the signals of the launcher in ``pending``; nothing else happens in the handler."""

        def note(signum: int, _frame: FrameType | None) -> None:
            self.pending.append((signal.Signals(signum), time.monotonic()))

        previous = {signum: signal.getsignal(signum) for signum in FORWARDED}
        # nohup means: outlive the terminal.
        caught = [s for s in FORWARDED if not (s is signal.SIGHUP and previous[s] is signal.SIG_IGN)]
        for signum in caught:
            signal.signal(signum, note)
        try:
            yield
        finally:
            for signum in caught:
                signal.signal(signum, previous[signum] if previous[signum] is not None else signal.SIG_DFL)

    def start(
        self,
        command: list[str],
        processes: int,
        environment: dict[str, str],
        place: Callable[[int], RankEnvironment],
    ) -> None:
        # Inside a SLURM job the scheduler repeats SIGTERM while it waits, and sends SIGKILL itself in the end.
        self.tolerates_repeats = "SLURM_JOB_ID" in environment
        for rank in range(processes):
            if self.pending:  # told to stop before all had started: the missing ranks would leave the others waiting
                self.incomplete = True
                break
            variables = dict(environment)
            export(place(rank), variables)
            variables[PARENT_VARIABLE] = str(os.getpid())
            process = subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL, start_new_session=True)
            self.ranks.append(_Rank(rank, process))

    def watch(self) -> None:
        """Return when every rank has ended."""
        while any(not rank.ended for rank in self.ranks):
            self.handle_signals()
            self.notice_ends()
            self.stop_after_failure()
            time.sleep(_POLL_SECONDS)

    def handle_signals(self) -> None:
        while self.pending:
            signum, at = self.pending.pop(0)
            self.first_signal = self.first_signal or signum
            if signum in (signal.SIGINT, signal.SIGTERM) and self.is_second_stop(signum, at):
                self.aborted_by = signum
                self.say(f"second {signum.name}: killing every rank; the last committed checkpoint stays")
                self.kill_all()
                return
            if signum in self.forwarded:
                continue
            self.forwarded.add(signum)
            self.say(f"{signum.name}: asking every rank to save and stop")
            for rank in self.running():
                rank.tell(signum)
            if self.incomplete:
                self.kill_all()

    def is_second_stop(self, signum: signal.Signals, at: float) -> bool:
        if self.last_stop is None:
            self.last_stop = (signum, at)
            return False
        before, when = self.last_stop
        if signum is signal.SIGTERM and self.tolerates_repeats:
            return False
        return not (signum is before and at - when < _SAME_SIGNAL_SECONDS[signum])

    def notice_ends(self) -> None:
        for rank in self.running():
            code = rank.process.poll()
            if code is None:
                continue
            rank.note_end(code)
            if rank.unexpected_signal is not None:
                hint = " (the system kills so when memory runs out)" if rank.killed_by is signal.SIGKILL else ""
                self.say(f"rank {rank.number} was killed by {rank.unexpected_signal.name}{hint}")
            elif code <= 0 or code == EXIT_REQUEUE:
                continue
            elif code != EXIT_REFUSED and self.failed_at is None:  # a refusal speaks for itself
                self.say(f"rank {rank.number} exited with code {code}")
            if self.failed_at is None:
                self.failed_at = time.monotonic()

    def stop_after_failure(self) -> None:
        """A failed rank leaves the others waiting in a collective: give them a moment, then SIGTERM, then SIGKILL."""
        if self.failed_at is None:
            return
        waited = time.monotonic() - self.failed_at
        for rank in self.running():
            if waited > 2 * self.grace_seconds:
                rank.kill()
            elif waited > self.grace_seconds and signal.SIGTERM not in rank.told:
                rank.tell(signal.SIGTERM)

    def running(self) -> list[_Rank]:
        return [rank for rank in self.ranks if not rank.ended]

    def kill_all(self) -> None:
        """Kill and reap what is left."""
        left = self.running()
        for rank in left:
            rank.kill()
        for rank in left:
            rank.note_end(rank.process.wait())

    def exit_code(self) -> int:
        if self.aborted_by is not None:
            return 128 + self.aborted_by
        codes = {rank.process.returncode for rank in self.ranks if rank.killed_by is None}
        for code in (EXIT_DO_NOT_RESTART, EXIT_REFUSED):
            if code in codes:
                return code
        if codes - {EXIT_OK, EXIT_REQUEUE} or any(rank.unexpected_signal for rank in self.ranks):
            return EXIT_FAILURE
        if EXIT_REQUEUE in codes:
            return EXIT_REQUEUE
        if self.first_signal is not None and any(rank.killed_by for rank in self.ranks):
            return 128 + self.first_signal
        if not self.ranks:
            return 128 + self.first_signal if self.first_signal is not None else EXIT_OK
        return EXIT_OK if codes == {EXIT_OK} else EXIT_FAILURE
