"""The supervisor where the machine is at fault too: file systems that hang, no threads, leftovers of other launches."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from test_launch_supervisor import Rank

from trainer.core.failure_file import reports_directory
from trainer.core.lock_owner import Owner, Place
from trainer.core.run_lock import lock_path
from trainer.resilience.rank_report import VERSION, RankReport, report_path

pytestmark = pytest.mark.fast

HANG = "phases.mark('evaluate', step=5); time.sleep(60)"
FORGETS = "import trainer.launch.supervisor as s; from trainer.launch.launch_reports import LaunchReports\n"
DEAD = FORGETS + "s._STORAGE_SECONDS = 0.3; LaunchReports.begin = lambda self: time.sleep(1000)"


def test_a_slow_file_system_is_no_suspended_job(tmp_path: Path) -> None:
    slow = FORGETS + "s._SUSPENDED_SECONDS = 0.4; LaunchReports.peer_failed = lambda self: time.sleep(0.8)"
    code, _, err = Rank(tmp_path, HANG, before=slow).end()
    assert code == 1
    assert "rank 0 on node0 hangs in evaluate of step 5" in err


def test_a_job_that_was_suspended_is_no_hang(tmp_path: Path) -> None:
    loop = "for _ in range(8): phases.mark('data'); time.sleep(0.2)\nos._exit(0)"
    rank = Rank(tmp_path, loop)
    pid = rank.pid()
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in (rank.process.pid, pid):
            os.kill(process, number)
        time.sleep(3.5 if number == signal.SIGSTOP else 0)
    assert rank.end() == (0, "", "")


def test_signals_are_passed_on_while_a_file_system_hangs(tmp_path: Path) -> None:
    rank = Rank(tmp_path, HANG, before=DEAD + "; s._STORAGE_SECONDS = 30")
    rank.pid()
    began = time.monotonic()
    rank.process.send_signal(signal.SIGTERM)
    while rank.process.poll() is None and Path(f"/proc/{rank.pid()}/stat").exists():
        assert time.monotonic() - began < 10
        time.sleep(0.02)
    rank.process.kill()
    rank.process.communicate()


def test_a_dead_file_system_leaves_the_sentence_on_stderr(tmp_path: Path) -> None:
    code, _, err = Rank(tmp_path, HANG, 1, 2, before=DEAD).end()
    assert code == 1
    assert "trainer: rank 1 on node1 hangs in evaluate of step 5" in err
    assert "host is gone" not in err
    assert not (tmp_path / "failures").exists()


def test_a_log_that_cannot_be_read_keeps_nobody(tmp_path: Path) -> None:
    dead = "from trainer.launch.rank_examiner import Examiner; import trainer.launch.supervisor as s\n"
    dead += "s._STORAGE_SECONDS = 0.3; Examiner.log_tail = lambda self: time.sleep(1000)"
    code, _, err = Rank(tmp_path, "os.kill(os.getpid(), 9)", before=dead).end()
    assert code == -9
    assert "rank 0 on node0 was killed by SIGKILL" in err


@pytest.mark.parametrize("before", [
    "import threading\ndef fails(*_): raise RuntimeError(\"can't start new thread\")\nos.register_at_fork("
    "after_in_parent=lambda: setattr(threading.Thread, 'start', fails))",
    "import trainer.launch.supervisor as s\ndef fails(*_): raise ValueError('x')\n"
    "s._Supervisor._look_at_network = s._Supervisor._judge = fails",
])  # fmt: skip
def test_a_fault_of_the_watchdog_leaves_no_rank_that_hangs(tmp_path: Path, before: str) -> None:
    rank = Rank(tmp_path, HANG, 0, 2, before=before)
    code, _, err = rank.end()
    assert code == 1
    assert "rank 0" in err
    assert not Path(f"/proc/{rank.pid()}").exists()


def test_do_not_restart_stands_though_the_rank_cannot_leave(tmp_path: Path) -> None:
    raises = "phases.board.note_exception(ValueError('nan'), 'Traceback', told=False, exit_code=93); time.sleep(60)"
    rank = Rank(tmp_path, raises)
    assert rank.end()[0] == 93
    assert rank.failure()["retryable"] is False


def test_an_end_is_seen_where_a_parent_ignores_it(tmp_path: Path) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    assert Rank(tmp_path, "os._exit(0)", preexec=ignore).end() == (0, "", "")


def test_a_quick_second_launch_of_the_same_name_speaks_for_itself(tmp_path: Path) -> None:
    directory = reports_directory(tmp_path, "launch-1")
    directory.mkdir(parents=True)
    for rank in (0, 1):
        old = RankReport(
            rank=rank, world_size=2, node_rank=rank, host="old", launch="launch-1", event="died", time_unix=1.0,
            phase="start", step=0, signal="SIGSEGV",
        )  # fmt: skip
        report_path(directory, rank).write_text(json.dumps({"version": VERSION} | asdict(old)))
    for name in ("told", "judged"):
        (directory / name).touch()
    rank = Rank(tmp_path, "for _ in range(4): phases.mark('data'); time.sleep(0.2)\nos.kill(os.getpid(), 9)", 1, 2)
    code, _, err = rank.end()
    assert code == -9
    assert "trainer: rank 1 on node1 was killed by SIGKILL" in err
    assert [report["host"] for report in rank.failure()["ranks"]] == ["node1"]


FULL = """
import errno, trainer.launch.supervisor as s
from trainer.launch.launch_reports import LaunchReports
def full(self, report, stacks):
    self.directory.mkdir(parents=True, exist_ok=True)
    raise OSError(errno.ENOSPC, "No space left on device")
LaunchReports.write = full
"""
RAISES = "phases.board.note_exception({}, 'Traceback', told=False); time.sleep({}); os._exit(1)"
LOST = "RuntimeError('Connection closed by peer [10.0.0.2]:4711')"


def test_on_a_full_disk_the_rank_that_knows_speaks(tmp_path: Path) -> None:
    """Rank 0 only lost its connection, and is the first to end."""
    cause = Rank(tmp_path, RAISES.format("ValueError('odd')", 1.5), 1, 2, before=FULL)
    cause.pid()
    echo = Rank(tmp_path, RAISES.format(LOST, 0), 0, 2, before=FULL)
    (_, _, of_echo), (_, _, of_cause) = echo.end(), cause.end()
    assert "trainer: rank 1 on node1 failed in start: ValueError: odd" in of_cause
    assert "lost a connection" not in of_echo


def test_a_lost_connection_is_told_where_nobody_knows_more(tmp_path: Path) -> None:
    echo = Rank(tmp_path, RAISES.format(LOST, 0), 0, 2, before=FULL + "s._LAST_WORD_SECONDS = 0.5")
    assert "trainer: rank 0 on node0 lost a connection in start" in echo.end()[2]


def test_the_word_of_a_report_that_found_no_room_is_not_lost(tmp_path: Path) -> None:
    """Another supervisor has spoken, but can't have known of it."""
    reports_directory(tmp_path, "launch-1").mkdir(parents=True)
    program = "time.sleep(0.5); (run / 'failures' / 'launch-1' / 'told').touch(); "
    rank = Rank(tmp_path, program + RAISES.format("ValueError('odd')", 0), 1, 2, before=FULL)
    assert "trainer: rank 1 on node1 failed in start: ValueError: odd" in rank.end()[2]


def test_words_of_all_ranks_are_told_once(tmp_path: Path) -> None:
    """Rank 0 tells them by itself, and its supervisor is not the first."""
    same = "phases.board.note_exception(ValueError('nan'), 'Traceback', told=True, exit_code=93); os._exit(93)"
    meet = "while not all((run / f'{other}.pid').exists() for other in (0, 1)): phases.mark('start'); time.sleep(0.01)"
    wait = "for _ in range({}): phases.mark('start'); time.sleep(0.1)"
    late = {rank: f"{meet}\n{wait.format(8 - 5 * rank)}\n{same}" for rank in (0, 1)}
    ranks = [Rank(tmp_path, late[rank], rank, 2, report_seconds=3.0) for rank in (0, 1)]
    said = "".join(rank.end()[2] for rank in ranks)
    assert said.count("what each rank did") == 1
    assert "failed in" not in said
    assert ranks[0].failure()["cause"].startswith("all ranks failed in start: ValueError: nan")


def lock(run: Path, owner: Owner) -> None:
    lock_path(run).write_bytes(owner.record())


def test_the_lock_of_a_start_that_was_killed_silences_nobody(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=subprocess.PIPE, check=True)
    lock(tmp_path, replace(Owner.new(Place.here(), 5.0), pid=int(gone.stdout)))
    rank = Rank(tmp_path, "os.kill(os.getpid(), 11)")
    assert "rank 0 on node0 was killed by SIGSEGV in start" in rank.end()[2]
    assert rank.failure()["rank"] == 0


def test_the_lock_of_another_host_is_watched_before_it_counts_as_nobodys(tmp_path: Path) -> None:
    lock(tmp_path, replace(Owner.new(Place.here(), 0.5), host="elsewhere"))
    rank = Rank(tmp_path, "os.kill(os.getpid(), 11)")
    began = time.monotonic()
    assert "was killed by SIGSEGV" in rank.end()[2]
    assert time.monotonic() - began > 1.2


def test_a_job_that_has_the_directory_is_left_alone(tmp_path: Path) -> None:
    lock(tmp_path, Owner.new(Place.here(), 5.0))  # this process
    rank = Rank(tmp_path, "os.kill(os.getpid(), 11)")
    assert rank.end()[2] == ""
    other = replace(Owner.new(Place.here(), 5.0), host="elsewhere")
    lock(tmp_path, other)
    rank = Rank(tmp_path, "(run / 'ready').touch(); time.sleep(2); os.kill(os.getpid(), 11)")
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    lock(tmp_path, other.refreshed())
    assert rank.end()[2] == ""
    assert not (tmp_path / "failure.json").exists()
