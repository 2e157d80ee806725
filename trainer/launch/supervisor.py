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
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from trainer.config.watchdog import WatchdogConfig
from trainer.core import phases
from trainer.core.environ import RankEnvironment
from trainer.core.errors import EXIT_DO_NOT_RESTART, EXIT_FAILURE, EXIT_OK, EXIT_REFUSED, EXIT_REQUEUE
from trainer.core.phases import Board, Snapshot
from trainer.core.private import GroupAccess, keep_private
from trainer.launch.failure import is_first, note_in_status, summarise_launch, tell, to_json
from trainer.launch.launch_reports import JUDGED, TOLD, LaunchReports
from trainer.launch.lock_watch import LockWatch
from trainer.launch.rank_examiner import Examiner, Place
from trainer.launch.reachability import Listener, own_address, unreachable, whom_to_ask
from trainer.launch.storage import Storage
from trainer.resilience.failure_classes import is_echo
from trainer.resilience.failure_summary import is_lost_connection, summarise_alone
from trainer.resilience.rank_report import Event, RankReport

T = TypeVar("T")
_POLL_SECONDS = 0.25
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_AWAITED = {signal.SIGCHLD, *_FORWARDED}
_UNREMARKABLE = (EXIT_OK, EXIT_REFUSED, EXIT_REQUEUE, 128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Ends that were asked for, or that the rank has explained as a refusal."""
_SUSPENDED_SECONDS = 2.5
"""A supervisor never waits for so long without looking at the clock."""
_RANKS_A_SECOND = 100
"""How often all supervisors together look into the directory of reports."""
_STORAGE_SECONDS = 10.0
"""A file system that does not answer must not keep a supervisor from ending its rank."""
_REPORTS_A_SECOND = 50
"""That a busy file system reads at least."""
_LAST_WORD_SECONDS = 10.0
"""For which a rank that only lost a connection lets others speak first where no report can be read."""
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
    address = _address(watched.ranks)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, as some parents leave it, no end is to be had
    # Blocked, so that none is lost between fork and wait.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    pid = os.fork()
    if pid == 0:
        _die_with(supervisor_pid)
        board.beat(watched.ranks.rank)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    examiner.attach(pid)
    code = EXIT_FAILURE
    try:
        code = _Supervisor(watched, board, examiner, pid, address).run()
    except Exception:  # noqa: BLE001 - nobody above would show it
        traceback.print_exc()
    finally:
        _end_as(code)


def _address(ranks: RankEnvironment) -> str:
    """Return where other nodes find this one, if this rank is to listen there; asked before anything can hang."""
    if ranks.local_rank != 0 or ranks.world_size == ranks.local_world_size:
        return ""
    return own_address(os.environ, ranks.master_address)


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


def _signal_descriptor() -> int:
    """Return a descriptor that can be read from while one of the awaited signals, which are blocked, is pending."""
    c, mask = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(1024 // 8)
    c.sigemptyset(mask)
    for number in _AWAITED:
        c.sigaddset(mask, int(number))
    descriptor = c.signalfd(-1, mask, os.O_CLOEXEC)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "signalfd")
    return descriptor


class _Supervisor:
    def __init__(self, watched: Watched, board: Board, examiner: Examiner, pid: int, address: str) -> None:
        self._watched, self._board, self._examiner, self._pid = watched, board, examiner, pid
        self._address = address
        self._settings = watched.settings
        self._rank, self._world_size = watched.ranks.rank, watched.ranks.world_size
        self._reports = LaunchReports(
            watched.run_directory, watched.launch, self._rank, unique=watched.ranks.launcher == "slurm"
        )
        self._watching = True
        self._complaints: set[str] = set()
        self._passed_on: set[int] = set()
        self._ended: int | None = None
        self._resumed_at = self._looked_at = time.monotonic()
        self._stopped_since: float | None = None
        self._raised_since: float | None = None
        self._report: RankReport | None = None
        self._saved = False
        """Whether a report could be written down."""
        self._lock = LockWatch(watched.run_directory)
        self._listener: Listener | None = None
        self._peers_asked_at = 0.0
        self._look_every_seconds = max(0.5, self._world_size / _RANKS_A_SECOND)
        self._notice_seconds = max(self._settings.report_seconds, 1.0 + 2 * self._look_every_seconds)
        """Others need so long at least to notice a report and write theirs: who left none by then counts as gone."""
        self._signals = select.poll()
        self._signals.register(_signal_descriptor(), select.POLLIN)
        self._storage = Storage(lambda: self._wait(0.0))

    def run(self) -> int:
        """Return when the rank has ended or was killed: its exit code, negative for a signal."""
        keep_private(self._watched.group_access)
        self._in_time(self._reports.begin, None)
        self._in_time(self._lock.begin, None)
        while self._ended is None:
            self._wait(_POLL_SECONDS)
            if self._ended is None and self._watching and self._guarded(self._watch):
                return self._code_of(EXIT_FAILURE)
        if self._ended not in _UNREMARKABLE and -self._ended not in self._passed_on:
            self._guarded(self._explain_end)
        return self._ended

    def _in_time(self, action: Callable[[], T], otherwise: T, extra_seconds: float = 0.0) -> T:
        """Return what ``action`` reads or writes on the file system, ``otherwise`` if it fails or does not answer."""
        return self._storage.ask(action, otherwise, _STORAGE_SECONDS + extra_seconds)

    def _guarded(self, action: Callable[[], bool | None]) -> bool:
        """Return what ``action`` does; a fault of the watchdog must not end a training run."""
        try:
            return bool(action())
        except Exception as error:  # noqa: BLE001
            if not isinstance(error, RuntimeError):  # "can't start new thread" may be over soon
                self._watching = False
            if repr(error) not in self._complaints:
                self._complaints.add(repr(error))
                print(f"trainer: rank {self._rank}: the watchdog failed, training goes on: {error!r}", file=sys.stderr)
            return False

    def _code_of(self, code: int) -> int:
        """Return ``code``, or that of an exception which says not to restart: ending after it may hang or crash."""
        raised = self._board.snapshot().raised
        return EXIT_DO_NOT_RESTART if raised is not None and raised.exit_code == EXIT_DO_NOT_RESTART else code

    def _wait(self, seconds: float) -> None:
        """Wait for a signal and act on it: pass it on, or note that the rank has ended."""
        # sigtimedwait returns what it finds in memory if this process is stopped and goes on after the time is up.
        self._signals.poll(seconds * 1000)
        got = signal.sigtimedwait(_AWAITED, 0)
        self._look_at_clock(seconds)
        if got is not None and got.si_signo != signal.SIGCHLD:
            self._passed_on.add(got.si_signo)
            self._kill(got.si_signo)
        if self._ended is None:
            try:
                done, status = os.waitpid(self._pid, os.WNOHANG)
                if done:
                    self._ended = os.waitstatus_to_exitcode(status)
            except ChildProcessError:  # gone, and nobody can say how
                self._ended = EXIT_FAILURE

    def _look_at_clock(self, waited_seconds: float = 0.0) -> None:
        """Notice that this process was suspended, with the job: the rank could not make progress either."""
        now = time.monotonic()
        if now - self._looked_at > _SUSPENDED_SECONDS + waited_seconds:
            self._resumed_at = now
            self._stopped_since = None
        self._looked_at = now

    def _kill(self, number: int) -> None:
        """Send the rank a signal, while it is there: its number may belong to another process afterwards."""
        if self._ended is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)

    def _pause(self, seconds: float) -> None:
        """Let time pass, as long as nothing happens that must be acted on; signals are passed on meanwhile."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._wait(min(left, 0.1))

    def _watch(self) -> bool:
        """Look at the rank once. Return True if it has been killed because it hangs."""
        self._look_at_clock()
        now = time.monotonic()
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
            if self._in_time(self._reports.peer_failed, False) and self._ended is None:
                self._write("snapshot", snapshot, state, stalled, ask=state != "T")
        return False

    def _end_hang(self, event: Event, snapshot: Snapshot, state: str, stalled: float) -> bool:
        """Write what is known, let the others do the same, say who is the cause, and kill the rank."""
        try:
            # The sentence is about the rank as it was found; a stopped one goes on for a moment to show its stacks.
            self._write(event, snapshot, state, stalled, ask=True)
            self._kill(signal.SIGSTOP)  # being asked may wake it (EINTR): it must not move on half judged
            end = time.monotonic() + self._notice_seconds
            self._look_at_network(end)
            self._pause(max(0.0, end - time.monotonic()))
        except Exception as error:  # noqa: BLE001 - the rank must not stay as it is, whatever fails here
            print(f"trainer: rank {self._rank}: the watchdog could not see all: {error!r}", file=sys.stderr)
        finally:
            self._kill(signal.SIGKILL)
        self._guarded(lambda: self._judge(self._code_of(EXIT_FAILURE)))
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
        tail = self._in_time(self._examiner.log_tail, "")
        report = self._examiner.report(event, snapshot, ended=code, log_tail=tail)
        self._save(report, self._examiner.stacks(ask=False))
        echo = event == "raised" and is_echo(f"{report.exception_type}: {report.exception_message}")
        # All ranks may fail with the same words: the first of them judges, and rank 0, who may know more by then.
        if self._rank == 0 or (not echo and self._in_time(lambda: is_first(self._reports.directory, JUDGED), True)):
            end = time.monotonic() + self._notice_seconds
            while time.monotonic() < end and self._in_time(self._reports.count, 0) < self._world_size:
                self._pause(max(0.1, self._look_every_seconds / 5))
            self._judge(self._code_of(code if code == EXIT_DO_NOT_RESTART else EXIT_FAILURE))

    def _write(self, event: Event, snapshot: Snapshot, state: str, stalled: float, *, ask: bool = False) -> None:
        report = self._examiner.report(event, snapshot, state=state, stalled_seconds=max(0.0, stalled))
        stacks = self._examiner.stacks(ask=ask and self._ended is None, pause=self._pause)
        if event != "raised" and self._address:
            with contextlib.suppress(OSError, RuntimeError):
                self._listener = self._listener or Listener()
                report = replace(report, address=f"{self._address}:{self._listener.port}")
        self._save(report, stacks)

    def _save(self, report: RankReport, stacks: str) -> None:
        raised = self._board.snapshot().raised
        self._report, stacks = report, stacks or (raised.traceback if raised is not None else "")
        self._saved = self._in_time(lambda: self._reports.write(report, stacks), False) or self._saved

    def _look_at_network(self, end: float) -> None:
        """Let the first supervisor of each node try to reach the others' until ``end``."""
        report = self._report
        if report is None or not report.address:
            return
        self._pause(max(0.0, end - time.monotonic()) / 2)  # the others publish their addresses
        found = self._in_time(self._reports.read, [])
        reports = [other for other in found if other.address and other.rank != self._rank]
        asked = whom_to_ask(report.node_rank, [report.node_rank, *(r.node_rank for r in reports)])
        failed = unreachable({r.host: r.address for r in reports if r.node_rank in asked}, end, self._pause)
        if failed:
            self._save(replace(report, unreachable=tuple(failed)), "")
            self._pause(1.0)  # rank 0's supervisor reads it

    def _judge(self, exit_code: int) -> None:
        """Say who is the cause, if that is this supervisor's part, and complete status.json."""
        report = self._report
        if report is None:  # it could not be made, and that has been said
            return
        first_hand = report.event in ("died", "exited", "raised")
        if not (first_hand or self._rank == 0 or self._in_time(self._reports.is_lowest, True)):
            return
        holds = self._holder()
        if holds not in (None, self._pid):  # another job has the directory
            return
        directory, launch = self._watched.run_directory, self._watched.launch
        since_ns, extra_seconds = self._reports.since_ns, self._world_size / _REPORTS_A_SECOND
        fields = self._in_time(
            lambda: summarise_launch(directory, launch, self._watched.hosts, since_ns), None, extra_seconds
        )
        lost = is_lost_connection(report)
        unheard = first_hand and not lost and not self._saved  # a full disk: no other supervisor knows of it
        alone = fields is None or unheard
        if alone:  # nothing could be written or read in time: this rank's own part
            failure = summarise_alone(report)
            fields = to_json(failure, launch, [report]) if failure is not None else None
        if fields is None:
            return
        snapshot = self._board.snapshot()
        raised = snapshot.raised
        told = raised is not None and raised.told and self._rank in fields["same_words"]
        known = alone and lost and self._others_tell()
        if not known and (self._in_time(lambda: is_first(self._reports.directory, TOLD), True) or unheard):
            tell(directory, fields, told=told)
        if self._rank == 0 and (snapshot.started or holds == self._pid):
            echo = raised is not None and is_echo(f"{raised.type}: {raised.message}")
            cause = str(fields["cause"])
            self._in_time(
                lambda: note_in_status(directory, exit_code, cause, began=snapshot.started, replaces_reason=echo),
                None,
            )

    def _holder(self) -> int | None:
        """Return the process that holds the run directory, None: nobody, or not known as this is not rank 0."""
        if self._rank != 0:
            return None
        while True:
            holds, seconds = self._in_time(lambda: self._lock.holder(self._pid), (None, 0.0))
            if seconds <= 0:
                return holds
            self._pause(min(seconds, 1.0))

    def _others_tell(self) -> bool:
        """Return whether a supervisor tells of the failure whose rank may know more than that it lost a connection."""
        end = time.monotonic() + self._notice_seconds + _LAST_WORD_SECONDS
        while time.monotonic() < end:
            if self._in_time(self._reports.are_told, False):
                return True
            self._pause(0.5)
        return False
