"""A process beside each rank that outlives it: passes signals on, notices its end or its silence, and says why.

The process that a launcher started becomes the supervisor, and the rank its child, so that any launcher will do. A
supervisor judges its own rank alone, by what the rank writes into shared memory: a job ends even where its nodes can
no longer talk to each other. When one rank fails, the supervisors of all write down what theirs is doing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from trainer.config.watchdog import WatchdogConfig
from trainer.core import phases
from trainer.core.environ import RankEnvironment
from trainer.core.errors import EXIT_DO_NOT_RESTART, EXIT_FAILURE, EXIT_OK, EXIT_REFUSED, EXIT_REQUEUE
from trainer.core.failure_file import reports_directory
from trainer.core.lock_owner import Owner
from trainer.core.phases import Board, Snapshot
from trainer.core.private import GroupAccess, directory_mode, file_mode, keep_private
from trainer.core.run_lock import lock_path
from trainer.launch.failure import is_first, note_in_status, summarise_launch, tell_once, to_json
from trainer.launch.rank_examiner import Examiner, Place
from trainer.launch.reachability import Listener, own_address, unreachable, whom_to_ask
from trainer.resilience.failure_classes import is_echo
from trainer.resilience.failure_summary import summarise
from trainer.resilience.rank_report import Event, RankReport, read_reports, report_path, stacks_path, write_report

T = TypeVar("T")
_POLL_SECONDS = 0.25
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_UNREMARKABLE = (EXIT_OK, EXIT_REFUSED, EXIT_REQUEUE, 128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Ends that were asked for, or that the rank has explained as a refusal."""
_STALE_SECONDS = 10.0
"""Ranks of one launch start within this time; where SLURM names launches no two are called alike."""
_KEPT_LAUNCHES = 20
_RANKS_A_SECOND = 100
"""How often all supervisors together look into the directory of reports."""
_STORAGE_SECONDS = 10.0
"""A file system that does not answer must not keep a supervisor from ending its rank."""
_KILL_SECONDS = 10.0
"""A process in an uninterruptible wait does not die; its supervisor then leaves without it."""


@dataclass(frozen=True)
class Watched:
    """What a supervisor has to know."""

    ranks: RankEnvironment
    run_directory: Path
    group_access: GroupAccess
    settings: WatchdogConfig
    launch: str
    host: str
    hosts: dict[int, str] = field(default_factory=dict[int, str])
    """Host of each rank, as far as known."""


def become_rank(watched: Watched) -> None:
    """Fork: return in the child, which is the rank. The parent supervises it, and ends as it ends.

    To be called before threads are started and torch is imported.
    """
    settings = watched.settings
    board = phases.new_board(settings.start_seconds, settings.slow_seconds)
    examiner = Examiner(board, Place(watched.ranks, watched.host, watched.launch, watched.run_directory))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    supervisor_pid = os.getpid()
    # Blocked, so that none is lost between fork and wait.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, *_FORWARDED})
    pid = os.fork()
    if pid == 0:
        _die_with(supervisor_pid)
        board.beat(watched.ranks.rank)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    examiner.attach(pid)
    code = EXIT_FAILURE
    try:
        code = _Supervisor(watched, board, examiner, pid).run()
    finally:
        _end_as(code)


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it died before the request was made
        os.kill(os.getpid(), signal.SIGKILL)


def _end_as(code: int) -> None:
    """Leave with the rank's exit code, or by the signal that killed it: launchers tell the two apart."""
    if code < 0:
        resource.setrlimit(
            resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1])
        )  # the rank's is enough
        with contextlib.suppress(OSError, ValueError):
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
        os.kill(os.getpid(), -code)
        code = 128 - code  # a signal that does not kill
    os._exit(code)


class _Supervisor:
    def __init__(self, watched: Watched, board: Board, examiner: Examiner, pid: int) -> None:
        self._watched, self._board, self._examiner, self._pid = watched, board, examiner, pid
        self._settings = watched.settings
        self._rank, self._world_size = watched.ranks.rank, watched.ranks.world_size
        self._directory = reports_directory(watched.run_directory, watched.launch)
        self._watching = True
        self._passed_on: set[int] = set()
        self._ended: int | None = None
        self._resumed_at = self._looked_at = time.monotonic()
        self._stopped_since: float | None = None
        self._raised_since: float | None = None
        self._report: RankReport | None = None
        self._listener: Listener | None = None
        self._seen_directory = 0
        self._peers_asked_at = 0.0
        self._look_every_seconds = max(0.5, self._world_size / _RANKS_A_SECOND)
        self._storage: threading.Thread | None = None

    def run(self) -> int:
        """Return when the rank has ended or was killed: its exit code, negative for a signal."""
        keep_private(self._watched.group_access)
        self._in_time(self._clear_old_reports, None)
        while self._ended is None:
            self._wait(_POLL_SECONDS)
            if self._ended is None and self._watching and self._guarded(self._watch):
                return EXIT_FAILURE
        if self._ended not in _UNREMARKABLE and -self._ended not in self._passed_on:
            self._guarded(self._explain_end)
        return self._ended

    def _in_time(self, action: Callable[[], T], otherwise: T) -> T:
        """Return what ``action`` reads or writes on the file system, ``otherwise`` if it fails or does not answer."""
        found: list[T] = []

        def act() -> None:
            with contextlib.suppress(OSError):
                found.append(action())

        if self._storage is None or not self._storage.is_alive():
            self._storage = threading.Thread(target=act, name="storage", daemon=True)
            self._storage.start()
            self._storage.join(_STORAGE_SECONDS)
        return found[0] if found else otherwise

    def _guarded(self, action: Callable[[], bool | None]) -> bool:
        """Return what ``action`` does; a fault of the watchdog must not end a training run."""
        try:
            return bool(action())
        except Exception as error:  # noqa: BLE001
            self._watching = False
            print(f"trainer: rank {self._rank}: the watchdog failed, training goes on: {error!r}", file=sys.stderr)
            return False

    def _wait(self, seconds: float) -> None:
        """Wait for a signal and act on it: pass it on, or note that the rank has ended."""
        got = signal.sigtimedwait({signal.SIGCHLD, *_FORWARDED}, seconds)
        if got is not None and got.si_signo != signal.SIGCHLD:
            self._passed_on.add(got.si_signo)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, got.si_signo)
        if self._ended is None:
            with contextlib.suppress(ChildProcessError):
                done, status = os.waitpid(self._pid, os.WNOHANG)
                if done:
                    self._ended = os.waitstatus_to_exitcode(status)

    def _pause(self, seconds: float) -> None:
        """Let time pass, as long as nothing happens that must be acted on; signals are passed on meanwhile."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._wait(min(left, 0.1))

    def _watch(self) -> bool:
        """Look at the rank once. Return True if it has been killed because it hangs."""
        now = time.monotonic()
        if now - self._looked_at > 10 * _POLL_SECONDS:  # this process was suspended too, with the job or the laptop
            self._resumed_at = now
            self._stopped_since = None
        self._looked_at = now
        snapshot, state = self._board.snapshot(), self._examiner.state()
        stalled = now - max(snapshot.changed_at, self._resumed_at)
        grace = self._settings.grace_seconds
        self._stopped_since = (self._stopped_since or now) if state == "T" else None
        if snapshot.raised is not None:
            if self._raised_since is None:
                self._raised_since = now
                self._write("raised", snapshot, state, stalled)
            return now - self._raised_since > grace and self._end_hang("raised", snapshot, state, stalled)
        if self._stopped_since is not None and now - self._stopped_since > grace:
            return self._end_hang("stalled", snapshot, state, stalled)
        if stalled > snapshot.allowed_seconds + grace:
            return self._end_hang("stalled", snapshot, state, stalled)
        if self._report is None and now - self._peers_asked_at > self._look_every_seconds:
            self._peers_asked_at = now
            if self._in_time(self._peer_failed, False):
                self._write("snapshot", snapshot, state, stalled, ask=state != "T")
        return False

    def _end_hang(self, event: Event, snapshot: Snapshot, state: str, stalled: float) -> bool:
        """Write what is known, let the others do the same, say who is the cause, and kill the rank."""
        # The sentence is about the rank as it was found; a stopped one goes on for a moment to show its stacks.
        self._write(event, snapshot, state, stalled, ask=True)
        # At least as long as the others need to notice: who left no report counts as gone.
        end = time.monotonic() + max(self._settings.report_seconds, 1.0 + 2 * self._look_every_seconds)
        self._look_at_network(end)
        self._pause(max(0.0, end - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        self._judge(EXIT_FAILURE)
        end = time.monotonic() + _KILL_SECONDS
        while self._ended is None and time.monotonic() < end:
            self._wait(0.1)
        return True

    def _explain_end(self) -> None:
        """Write why the rank has ended, let the others write too, and say who is the cause."""
        code = self._ended
        assert code is not None
        snapshot = self._board.snapshot()
        event: Event = "died" if code < 0 else "raised" if snapshot.raised is not None else "exited"
        report = self._examiner.report(event, snapshot, ended=code)
        self._save(report, self._examiner.stacks(ask=False))
        echo = event == "raised" and is_echo(f"{report.exception_type}: {report.exception_message}")
        # All ranks may fail with the same words: the first of them judges, and rank 0, who may know more by then.
        if self._rank == 0 or (not echo and self._in_time(lambda: is_first(self._directory, "judged"), True)):
            end = time.monotonic() + self._settings.report_seconds
            while time.monotonic() < end and self._in_time(self._num_reports, 0) < self._world_size:
                self._pause(max(0.1, self._look_every_seconds / 5))
            self._judge(code if code == EXIT_DO_NOT_RESTART else EXIT_FAILURE)

    def _write(self, event: Event, snapshot: Snapshot, state: str, stalled: float, *, ask: bool = False) -> None:
        report = self._examiner.report(event, snapshot, state=state, stalled_seconds=max(0.0, stalled))
        stacks = self._examiner.stacks(ask=ask)
        if event != "raised" and self._watched.ranks.local_rank == 0:
            with contextlib.suppress(OSError):
                self._listener = self._listener or Listener()
                address = own_address(os.environ, self._watched.ranks.master_address)
                report = replace(report, address=f"{address}:{self._listener.port}")
        self._save(report, stacks)

    def _save(self, report: RankReport, stacks: str) -> None:
        raised = self._board.snapshot().raised
        self._report, stacks = report, stacks or (raised.traceback if raised is not None else "")
        self._in_time(lambda: self._write_files(report, stacks), None)

    def _write_files(self, report: RankReport, stacks: str) -> None:
        if not self._watched.run_directory.is_dir():
            return
        self._directory.parent.mkdir(mode=directory_mode(), exist_ok=True)
        self._directory.mkdir(mode=directory_mode(), exist_ok=True)
        if stacks:
            path, flags = stacks_path(self._directory, self._rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            with open(os.open(path, flags, file_mode()), "w", encoding="utf-8") as file:
                file.write(stacks)
        write_report(self._directory, report)

    def _look_at_network(self, end: float) -> None:
        """Let the first supervisor of each node try to reach the others' until ``end``."""
        report = self._report
        if report is None or not report.address or self._world_size == self._watched.ranks.local_world_size:
            return
        self._pause(max(0.0, end - time.monotonic()) / 2)  # the others publish their addresses
        found = self._in_time(lambda: read_reports(self._directory, self._watched.launch), [])
        reports = [other for other in found if other.address and other.rank != self._rank]
        asked = whom_to_ask(report.node_rank, [report.node_rank, *(r.node_rank for r in reports)])
        failed = unreachable({r.host: r.address for r in reports if r.node_rank in asked}, end)
        if failed:
            self._save(replace(report, unreachable=tuple(failed)), "")
            self._pause(1.0)  # rank 0's supervisor reads it

    def _judge(self, exit_code: int) -> None:
        """Say who is the cause, if that is this supervisor's part, and complete status.json."""
        report = self._report
        assert report is not None
        first_hand = report.event in ("died", "exited", "raised")
        if not (first_hand or self._rank == 0 or self._in_time(self._is_lowest, True)):
            return
        holds = self._in_time(self._holder, None)
        if holds not in (None, self._pid):  # another job has the directory
            return
        directory, launch = self._watched.run_directory, self._watched.launch
        fields = self._in_time(lambda: summarise_launch(directory, launch, self._watched.hosts), None)
        if fields is None:  # nothing could be written or read: this rank's own part
            failure = summarise([report])
            fields = to_json(failure, launch, [report]) if failure is not None else None
        if fields is None:
            return
        snapshot = self._board.snapshot()
        raised = snapshot.raised
        told = raised is not None and raised.told and fields["rank"] == self._rank
        self._in_time(lambda: tell_once(directory, fields, told=told), None)
        if self._rank == 0 and (snapshot.started or holds == self._pid):
            echo = raised is not None and is_echo(f"{raised.type}: {raised.message}")
            cause = str(fields["cause"])
            self._in_time(
                lambda: note_in_status(directory, exit_code, cause, began=snapshot.started, replaces_reason=echo),
                None,
            )

    def _holder(self) -> int | None:
        """Return the process that holds the run directory, None: nobody, or not known as this is not rank 0."""
        owner = Owner.parse(lock_path(self._watched.run_directory).read_bytes()) if self._rank == 0 else None
        return None if owner is None else owner.pid

    def _is_lowest(self) -> bool:
        """Return whether no rank before this one has left a report: its supervisor would have judged."""
        return not any(report_path(self._directory, rank).exists() for rank in range(self._rank))

    def _num_reports(self) -> int:
        with contextlib.suppress(OSError):
            return sum(name.startswith("rank-") and name.endswith(".json") for name in os.listdir(self._directory))
        return 0

    def _directory_changed(self) -> int:
        with contextlib.suppress(OSError):
            return self._directory.stat().st_mtime_ns
        return 0

    def _peer_failed(self) -> bool:
        """Return whether another supervisor of this launch has written a report since the last look."""
        changed = self._directory_changed()
        if changed == self._seen_directory:
            return False
        self._seen_directory = changed
        return self._num_reports() > 0

    def _clear_old_reports(self) -> None:
        """Delete reports of an earlier launch of the same name, and all but those of the newest launches."""
        if self._rank != 0:
            return
        with contextlib.suppress(OSError):
            unique = self._watched.ranks.launcher == "slurm"
            if not unique and time.time() - self._directory.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(self._directory)
                self._seen_directory = 0
            launches = [path for path in self._directory.parent.iterdir() if path.is_dir() and not path.is_symlink()]
            for path in sorted(launches, key=lambda path: path.stat().st_mtime)[:-_KEPT_LAUNCHES]:
                shutil.rmtree(path)
