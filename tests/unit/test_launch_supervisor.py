"""The supervisor with real processes: small Python programs in the place of ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.core.failure_file import reports_directory
from trainer.launch.failure import summarise_launch
from trainer.resilience.rank_report import read_reports, stacks_path

pytestmark = pytest.mark.fast

RANK = """
import os, signal, sys, time
from pathlib import Path
from trainer.config.watchdog import WatchdogConfig
from trainer.core import phases
from trainer.core.environ import RankEnvironment
from trainer.launch.supervisor import Watched, become_rank
run, rank, world, program = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
settings = WatchdogConfig(grace_seconds=0.4, start_seconds=0.3, slow_seconds=0.2, report_seconds=float(sys.argv[5]))
ranks = RankEnvironment(rank, world, 0, 1, rank, "127.0.0.1", 1, "environment")
exec(sys.argv[6])
become_rank(Watched(ranks, run, "none", settings, "launch-1", f"node{rank}"))
(run / f"{rank}.tmp").write_text(str(os.getpid()))
(run / f"{rank}.tmp").rename(run / f"{rank}.pid")
exec(program)
"""
LOCK = "import ctypes; phases.mark('forward', step=3, micro_batch=1); ctypes.PyDLL(None).sleep(60)"


class Rank:
    """A supervisor and the rank below it."""

    def __init__(
        self, run: Path, program: str, rank: int = 0, world: int = 1, report_seconds: float = 0.0, before: str = "",
        preexec: Callable[[], object] | None = None,
    ) -> None:  # fmt: skip
        """``before`` is run before the fork, by what becomes the supervisor."""
        self.run, self.rank = run, rank
        self.process = subprocess.Popen(
            [sys.executable, "-c", RANK, str(run), str(rank), str(world), program, str(report_seconds), before],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=preexec,
        )

    def pid(self) -> int:
        """Wait for the rank and return its process."""
        path, deadline = self.run / f"{self.rank}.pid", time.monotonic() + 30
        while not path.exists():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return int(path.read_text())

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err

    def failure(self) -> dict[str, Any]:
        return json.loads((self.run / "failure.json").read_text())


@pytest.mark.parametrize("code", [0, 2, 75])
def test_ends_that_were_asked_for_leave_no_trace(tmp_path: Path, code: int) -> None:
    ended, _, err = Rank(tmp_path, f"os._exit({code})").end()
    assert (ended, err) == (code, "")
    assert [path.name for path in tmp_path.iterdir()] == ["0.pid"]


@pytest.mark.parametrize(("program", "expected", "words"), [
    ("os._exit(7)", 7, "rank 0 on node0 exited with code 7 without a word, in start"),
    ("phases.mark('forward', step=3); os.kill(os.getpid(), 9)", -9, "was killed by SIGKILL in forward of step 3"),
    ("phases.mark('save', step=8); os.kill(os.getpid(), 11)", -11, "was killed by SIGSEGV in save of step 8"),
])  # fmt: skip
def test_it_ends_as_the_rank_did_and_says_why(tmp_path: Path, program: str, expected: int, words: str) -> None:
    rank = Rank(tmp_path, program)
    code, _, err = rank.end()
    assert code == expected
    assert words in rank.failure()["cause"]
    assert rank.failure()["class"] == "killed"
    assert words in err
    if expected == -11:
        assert "Fatal Python error" in stacks_path(reports_directory(tmp_path, "launch-1"), 0).read_text()


def test_signals_are_passed_on(tmp_path: Path) -> None:
    program = "\n".join([
        "seen = []",
        "for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):",
        "    signal.signal(number, lambda number, frame: seen.append(signal.Signals(number).name))",
        "(run / 'ready').touch()",
        "while len(seen) < 5: phases.mark('data'); time.sleep(0.02)",
        "print(' '.join(sorted(seen)), flush=True); os._exit(75)",
    ])  # fmt: skip
    rank = Rank(tmp_path, program)
    rank.pid()
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        rank.process.send_signal(number)
    code, out, err = rank.end()
    assert (code, out.split(), err) == (75, ["SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"], "")


def test_a_rank_that_the_users_signal_kills_is_no_failure(tmp_path: Path) -> None:
    rank = Rank(tmp_path, "while True: phases.mark('data'); time.sleep(0.02)")
    rank.pid()
    rank.process.send_signal(signal.SIGTERM)
    assert rank.end()[0] == -signal.SIGTERM
    assert not (tmp_path / "failures").exists()


def test_a_rank_dies_with_its_supervisor(tmp_path: Path) -> None:
    rank = Rank(tmp_path, "while True: phases.mark('data'); time.sleep(0.02)")
    pid = rank.pid()
    rank.process.kill()
    rank.process.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    rank.process.communicate()


@pytest.mark.parametrize(("program", "kind", "words", "stack"), [
    ("phases.mark('evaluate', step=5, detail='valid')\ndef wait(): time.sleep(60)\nwait()", "hang",
     "rank 0 on node0 hangs in evaluate of step 5 (valid)", "in wait"),
    (LOCK, "hang", "in forward of step 3, micro-batch 1", "Current thread"),
    ("phases.mark('log', step=2); os.kill(os.getpid(), signal.SIGSTOP)", "stopped",
     "rank 0 on node0 is stopped (SIGSTOP), in log of step 2", "Current thread"),
])  # fmt: skip
def test_a_rank_that_hangs_is_ended_with_its_stacks(
    tmp_path: Path, program: str, kind: str, words: str, stack: str
) -> None:
    rank = Rank(tmp_path, program)
    code, _, err = rank.end()
    assert code == 1
    assert rank.failure()["class"] == kind
    assert words in rank.failure()["cause"]
    assert err.count(words) == 1
    assert stack in stacks_path(reports_directory(tmp_path, "launch-1"), 0).read_text()


def test_a_rank_that_moves_slowly_is_left_alone(tmp_path: Path) -> None:
    program = "for i in range(12): phases.mark('evaluate', micro_batch=i); time.sleep(0.25)\nos._exit(0)"
    assert Rank(tmp_path, program).end() == (0, "", "")


def test_one_rank_dies_and_the_other_tells_what_it_does(tmp_path: Path) -> None:
    waits = Rank(
        tmp_path,
        "phases.board.enter('all_reduce', '', 8)\n"
        "def wait():\n  while True: phases.mark('backward', step=4); time.sleep(0.02)\nwait()",
        1,
        2,
    )
    waits.pid()
    # It is waited for as long as so many supervisors need to look, whatever report_seconds says.
    slow = "import trainer.launch.supervisor as s; s._RANKS_A_SECOND = 0.2"
    dies = Rank(tmp_path, "phases.mark('backward', step=4); os.kill(os.getpid(), 9)", 0, 2, before=slow)
    assert dies.end()[0] == -9
    reports = read_reports(reports_directory(tmp_path, "launch-1"), "launch-1")
    assert [(report.rank, report.event) for report in reports] == [(0, "died"), (1, "snapshot")]
    assert "in wait" in stacks_path(reports_directory(tmp_path, "launch-1"), 1).read_text()
    assert dies.failure()["rank"] == 0
    waits.process.kill()
    waits.process.communicate()


def test_a_launch_whose_ranks_vanished_is_summarised_afterwards(tmp_path: Path) -> None:
    """What a batch script does after srun: rank 0 left no report."""
    rank = Rank(
        tmp_path, "phases.mark('forward', step=9); phases.board.enter('all_reduce', '', 8); time.sleep(60)", 1, 2
    )
    assert rank.end()[0] == 1
    (tmp_path / "failure.json").unlink()
    found = summarise_launch(tmp_path, "launch-1", {0: "node7", 1: "node1"})
    assert found is not None
    assert (found["class"], found["suspect_hosts"], found["rank"]) == ("node", ["node7"], 0)
    assert "rank 0 on node7 left no sign" in found["cause"]
    assert summarise_launch(tmp_path, "another") is None


def test_old_reports_of_the_same_name_do_not_mislead(tmp_path: Path) -> None:
    directory = reports_directory(tmp_path, "launch-1")
    directory.mkdir(parents=True)
    (directory / "rank-00001.json").write_text("{}")
    os.utime(directory, (1, 1))
    for number in range(30):
        (directory.parent / f"older-{number}").mkdir()
        os.utime(directory.parent / f"older-{number}", (number, number))
    assert Rank(tmp_path, "time.sleep(0.2); os._exit(0)").end()[0] == 0
    assert not directory.exists()
    assert sorted(int(path.name[6:]) for path in directory.parent.iterdir()) == list(range(10, 30))
