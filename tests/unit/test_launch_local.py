"""The local launcher with real processes: small Python programs in the place of ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

LAUNCH = """
import sys
from trainer.launch.local import run_local
sys.exit(run_local([sys.executable, "-c", sys.argv[2]], int(sys.argv[1]), grace_seconds=0.3))
"""
BEGIN = """
import os, signal, sys, time
from pathlib import Path
rank = int(os.environ["RANK"])
def ready():
    Path(os.environ["READY"], f"{rank}.tmp").write_text(str(os.getpid()))
    Path(os.environ["READY"], f"{rank}.tmp").rename(Path(os.environ["READY"], str(rank)))
"""
STOPPABLE = (
    BEGIN
    + """
seen = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, frame: seen.append(signal.Signals(number).name))
ready()
while not seen:
    time.sleep(0.01)
time.sleep(float(os.environ.get("SAVE_SECONDS", "0.2")))
os.write(1, f"{rank} {chr(32).join(seen)}\\n".encode())
sys.exit(75)
"""
)


class Launched:
    """A launcher in a process of its own, and its ranks."""

    def __init__(self, tmp_path: Path, rank_program: str, processes: int = 2, **environment: str) -> None:
        self.directory, self.processes = tmp_path, processes
        variables = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(processes), rank_program],
            env={**variables, "READY": str(tmp_path), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_ready(self) -> list[int]:
        deadline = time.monotonic() + 20
        while not all((self.directory / str(rank)).exists() for rank in range(self.processes)):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return [int((self.directory / str(rank)).read_text()) for rank in range(self.processes)]

    def finish(self) -> tuple[int, list[str], str]:
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, sorted(out.splitlines()), err


def is_running(pid: int) -> bool:
    try:
        # A zombie is dead: process 1 of a container may reap late.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_gone(pids: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still running after {seconds} s: {pids}"
        time.sleep(0.01)


def test_ranks_get_their_places(tmp_path):
    program = (
        "import os; from trainer.core.environ import detect; r = detect(os.environ)\n"
        "own = os.getsid(0) == os.getpid()\n"
        "line = [r.rank, r.world_size, r.local_rank, r.local_world_size, r.master_address, r.launcher, own]\n"
        "os.write(1, (' '.join(map(str, line)) + chr(10)).encode())"
    )
    code, lines, _ = Launched(tmp_path, program, 3).finish()
    assert code == 0
    assert lines == [f"{rank} 3 {rank} 3 127.0.0.1 local True" for rank in range(3)]


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], 0),
        ([75, 75], 75),
        ([0, 75], 75),
        ([0, 1], 1),
        ([75, 1], 1),
        ([2, 2], 2),
        ([2, 1], 2),
        ([1, 93], 93),
        ([75, 93], 93),
        ([2, 93], 93),
        ([0, 7], 1),
    ],
)
def test_exit_codes_become_one(tmp_path, codes, expected):
    program = f"import os, sys; sys.exit({codes}[int(os.environ['RANK'])])"
    assert Launched(tmp_path, program).finish()[0] == expected


def test_failing_rank_takes_the_others_along(tmp_path):
    """The others hang in a collective and do not even answer SIGTERM."""
    program = BEGIN + (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nready()\nif rank == 1: sys.exit(3)\ntime.sleep(60)\n"
    )
    launched = Launched(tmp_path, program, 3)
    started = time.monotonic()
    code, _, err = launched.finish()
    assert code == 1
    assert "rank 1 exited with code 3" in err
    assert time.monotonic() - started < 10
    wait_gone([int((tmp_path / str(rank)).read_text()) for rank in range(3)], 1)


def test_rank_killed_by_a_signal_is_named(tmp_path):
    launched = Launched(tmp_path, STOPPABLE)
    pids = launched.wait_ready()
    os.kill(pids[1], signal.SIGKILL)
    code, lines, err = launched.finish()
    assert code == 1
    assert "rank 1 was killed by SIGKILL" in err
    assert lines == ["0 SIGTERM"], "the other rank is asked to stop, not killed at once"


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        ("SIGTERM", "SIGTERM"),
        ("SIGINT", "SIGINT"),
        ("SIGHUP", "SIGHUP"),
        ("SIGUSR1", "SIGUSR1"),
        ("SIGUSR2", "SIGUSR2"),
    ],
)
def test_first_signal_lets_every_rank_save(tmp_path, sent, received):
    launched = Launched(tmp_path, STOPPABLE)
    launched.wait_ready()
    launched.process.send_signal(signal.Signals[sent])
    code, lines, _ = launched.finish()
    assert code == 75
    assert lines == [f"0 {received}", f"1 {received}"]


@pytest.mark.parametrize(("second", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_second_stop_kills_at_once(tmp_path, second, expected):
    launched = Launched(tmp_path, STOPPABLE, SAVE_SECONDS="60")
    pids = launched.wait_ready()
    launched.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert launched.process.poll() is None, "the first signal waits for the save"
    launched.process.send_signal(second)
    started = time.monotonic()
    code, lines, err = launched.finish()
    assert code == expected
    assert lines == []
    assert f"second {second.name}" in err
    assert time.monotonic() - started < 2
    wait_gone(pids, 1)


def test_one_stop_delivered_twice_is_one_stop(tmp_path):
    launched = Launched(tmp_path, STOPPABLE, SAVE_SECONDS="0.6")
    launched.wait_ready()
    launched.process.send_signal(signal.SIGTERM)
    time.sleep(0.15)
    launched.process.send_signal(signal.SIGTERM)
    assert launched.finish()[:2] == (75, ["0 SIGTERM", "1 SIGTERM"])


def test_slurm_may_repeat_sigterm(tmp_path):
    launched = Launched(tmp_path, STOPPABLE, SAVE_SECONDS="1.5", SLURM_JOB_ID="1")
    launched.wait_ready()
    for _ in range(2):
        launched.process.send_signal(signal.SIGTERM)
        time.sleep(0.7)
    assert launched.finish()[:2] == (75, ["0 SIGTERM", "1 SIGTERM"])


def test_ranks_that_die_of_the_users_signal(tmp_path):
    """Stopped before they could install a handler: nothing to save, nothing to requeue."""
    launched = Launched(tmp_path, BEGIN + "ready(); time.sleep(60)")
    launched.wait_ready()
    launched.process.send_signal(signal.SIGTERM)
    assert launched.finish()[0] == 143


def test_ranks_die_with_a_killed_launcher(tmp_path):
    program = BEGIN + (
        "from trainer.core.environ import die_with_parent\ndie_with_parent(os.environ)\nready()\ntime.sleep(60)\n"
    )
    launched = Launched(tmp_path, program)
    pids = launched.wait_ready()
    launched.process.kill()
    wait_gone(pids, 2)
    launched.process.communicate()


def test_what_a_rank_leaves_behind_is_removed(tmp_path):
    """Data workers of a rank that ended share its process group."""
    program = BEGIN + (
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], stdout=subprocess.DEVNULL,"
        " stderr=subprocess.DEVNULL)\n"
        "os.write(1, f'{child.pid}\\n'.encode())\n"
    )
    code, lines, _ = Launched(tmp_path, program).finish()
    assert code == 0
    wait_gone([int(line) for line in lines], 2)
