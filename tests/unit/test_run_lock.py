"""Two jobs on one run directory are refused, and a dead owner is told from a live one; by real processes.

What can't be had on one machine is injected (tests/lock_holder.py): another host is another host name and boot id, a
file system whose locks other hosts don't see is a flock that isn't supported.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lock_holder import no_flock
from ranks import TESTS

from trainer.core.errors import RefusedError
from trainer.core.lock_owner import Owner, Place
from trainer.core.run_lock import RunLock, holder, lock_path, refuse_if_held

pytestmark = pytest.mark.fast
INTERVAL_SECONDS = 0.5
WATCH_SECONDS = 2.4 * INTERVAL_SECONDS
NODE3 = {"host": "node3", "boot_id": "other"}


class Holder:
    """A process of tests/lock_holder.py."""

    def __init__(self, run: Path, **options: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "lock_holder.py"), str(run), json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.said: list[str] = []
        self.started = time.monotonic()
        self.answer = self.read()
        self.seconds = time.monotonic() - self.started

    def read(self) -> str:
        assert self.process.stdout is not None
        while (line := self.process.stdout.readline().strip()).startswith("says: "):
            self.said.append(line.removeprefix("says: "))
        return line

    def ask(self, what: str) -> str:
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)
        return self.read()

    def end(self, signum: signal.Signals = signal.SIGKILL) -> None:
        self.process.send_signal(signum)
        self.process.wait(timeout=10)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Holder]]:
    started: list[Holder] = []

    def make(**options: Any) -> Holder:
        started.append(Holder(tmp_path, **options))
        return started[-1]

    yield make
    for made in started:
        made.end()


def take(run: Path, said: list[str] | None = None, **options: Any) -> RunLock:
    say = said.append if said is not None else pytest.fail
    return RunLock(run, say=say, interval_seconds=INTERVAL_SECONDS, **options)


@pytest.mark.parametrize("flock", [True, False])
def test_a_live_owner_is_refused_with_its_name(tmp_path: Path, start: Callable[..., Holder], flock: bool) -> None:
    first = start(flock=flock, place={"slurm_job": "4711"})
    assert first.answer == "taken"
    second = start(flock=flock)
    pid, host = first.process.pid, Place.here().host
    assert f"another job is training here (pid {pid} on {host}, SLURM job 4711, since 20" in second.answer
    assert second.seconds < 5
    assert second.said == []
    assert str(holder(tmp_path)).startswith(f"pid {pid} on {host}")
    with pytest.raises(RefusedError, match=f"pid {pid} on"):
        refuse_if_held(tmp_path)
    assert first.ask("mine") == "True"


@pytest.mark.parametrize("flock", [True, False])
def test_a_killed_owner_of_this_host_is_dead_at_once(tmp_path: Path, start: Callable[..., Holder], flock: bool) -> None:
    first = start(flock=flock)
    first.process.kill()
    # Not waited for: a zombie still has its number and its start time.
    deadline = time.monotonic() + 5
    while holder(tmp_path) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    said: list[str] = []
    began = time.monotonic()
    lock = take(tmp_path, said, flock=fcntl.flock if flock else no_flock)
    assert time.monotonic() - began < WATCH_SECONDS
    assert said == [f"stale lock of pid {first.process.pid} on {Place.here().host} (the process is gone) taken over"]
    assert lock.still_mine()
    lock.release()


def test_a_number_that_another_process_got_since_is_a_dead_owner(tmp_path: Path) -> None:
    owner = Owner.new(Place.here(), INTERVAL_SECONDS)  # this process lives, but did not start then
    lock_path(tmp_path).write_bytes(Owner(**{**vars(owner), "pid_started_ticks": 1}).record())
    assert holder(tmp_path) is None
    said: list[str] = []
    take(tmp_path, said).release()
    assert len(said) == 1


def test_a_released_lock_is_taken_without_a_wait_or_a_word(tmp_path: Path, start: Callable[..., Holder]) -> None:
    first = start(place=NODE3)
    assert first.ask("release") == "released"
    assert lock_path(tmp_path).read_bytes() == b""
    assert holder(tmp_path) is None
    began = time.monotonic()
    take(tmp_path).release()
    assert time.monotonic() - began < WATCH_SECONDS


@pytest.mark.parametrize("content", [b"pid 17 on node3", b"", b"\0" * 1024, b"{}", b'{"pid": -1}', b"[" * 5000])
def test_content_that_names_nobody_keeps_nobody_out(tmp_path: Path, content: bytes) -> None:
    lock_path(tmp_path).write_bytes(content)
    assert holder(tmp_path) is None
    lock = take(tmp_path)
    assert lock.still_mine()
    lock.release()


def test_a_live_owner_of_another_host_is_told_by_its_heartbeat(tmp_path: Path, start: Callable[..., Holder]) -> None:
    first = start(place=NODE3, flock=False)
    assert str(holder(tmp_path)).startswith(f"pid {first.process.pid} on node3, since")
    second = start(flock=False)
    assert f"pid {first.process.pid} on node3" in second.answer
    assert second.answer.startswith("refused: ")
    assert second.said == [f"watching {lock_path(tmp_path)} for 2 s: is pid {first.process.pid} on node3 still alive?"]
    refuse_if_held(tmp_path)  # does not wait, so it can't know


def test_a_suspended_owner_of_another_host_loses_the_lock_and_finds_out(
    tmp_path: Path, start: Callable[..., Holder]
) -> None:
    first = start(place=NODE3, flock=False)
    first.process.send_signal(signal.SIGSTOP)
    assert holder(tmp_path) is None
    second = start(flock=False)
    assert second.answer == "taken"
    assert second.seconds > WATCH_SECONDS
    assert second.said[1:] == [f"stale lock of pid {first.process.pid} on node3 (no sign of life for 2 s) taken over"]
    first.process.send_signal(signal.SIGCONT)
    assert first.ask("mine") == "False"
    time.sleep(3 * INTERVAL_SECONDS)  # its heartbeat must not write either
    assert second.ask("mine") == "True"
    assert first.ask("release") == "released"  # what it no longer has
    assert second.ask("mine") == "True"
    assert start(flock=False).answer.startswith("refused: ")


def test_an_owner_that_releases_while_it_is_watched_is_no_owner(tmp_path: Path, start: Callable[..., Holder]) -> None:
    first = start(place=NODE3, flock=False, interval_seconds=2.0)
    process = subprocess.Popen(
        [sys.executable, str(TESTS / "lock_holder.py"), str(tmp_path), json.dumps({"flock": False})],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().startswith("says: watching")
    assert first.ask("release") == "released"
    assert process.stdout.readline() == "taken\n"
    process.kill()
    process.wait(timeout=10)


JOB = {"slurm_cluster": "c", "slurm_job": "4711"}


def test_a_requeued_job_takes_over_from_its_former_self_at_once(tmp_path: Path, start: Callable[..., Holder]) -> None:
    first = start(place=NODE3 | JOB, flock=False)
    second = start(place=JOB | {"slurm_restarts": 1}, flock=False)
    assert second.answer == "taken"
    why = "SLURM job 4711 was requeued since"
    assert second.said == [f"stale lock of pid {first.process.pid} on node3 ({why}) taken over"]
    assert first.ask("mine") == "False"  # an orphan of the former self


@pytest.mark.parametrize("changes", [{"slurm_job": "4712"}, {"slurm_cluster": "d"}, {"slurm_restarts": 0}])
def test_another_job_is_no_requeue(tmp_path: Path, start: Callable[..., Holder], changes: dict[str, Any]) -> None:
    start(place=NODE3 | JOB, flock=False)
    second = start(place=JOB | {"slurm_restarts": 1} | changes, flock=False)
    assert second.answer.startswith("refused: ")


def test_a_machine_of_the_same_name_is_watched(start: Callable[..., Holder]) -> None:
    start(place={"host": "worker-0", "boot_id": "one"}, flock=False)
    second = start(place={"host": "worker-0", "boot_id": "another"}, flock=False)
    assert second.answer.startswith("refused: ")


def test_processes_of_another_pid_namespace_are_watched(tmp_path: Path, start: Callable[..., Holder]) -> None:
    first = start(place={"pid_namespace": "pid:[1]"}, flock=False)
    second = start(flock=False)
    assert second.answer.startswith("refused: ")
    assert len(second.said) == 1
    first.end()
    assert start(flock=False).answer == "taken"


def test_a_lock_file_that_was_deleted_comes_back(tmp_path: Path, start: Callable[..., Holder]) -> None:
    first = start()
    lock_path(tmp_path).unlink()
    time.sleep(2 * INTERVAL_SECONDS)
    assert first.ask("mine") == "True"
    assert start().answer.startswith("refused: ")


def test_a_start_after_the_file_was_deleted_wins(tmp_path: Path, start: Callable[..., Holder]) -> None:
    first = start(interval_seconds=30.0)
    lock_path(tmp_path).unlink()
    second = start()
    assert second.answer == "taken"
    assert first.ask("mine") == "False"
    assert second.ask("mine") == "True"


def symlink(path: Path) -> None:
    path.with_name("victim").write_text("precious")
    path.symlink_to("victim")


def hard_link(path: Path) -> None:
    path.with_name("victim").write_text("precious")
    path.hardlink_to(path.with_name("victim"))


def foreign(path: Path) -> None:
    path.touch()
    os.chown(path, 12345, -1)


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (symlink, "not a regular file"),
        (hard_link, "another file's second name"),
        (os.mkfifo, "not a regular file"),
        (os.mkdir, "not a regular file"),
        pytest.param(
            foreign,
            "belongs to user 12345",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away"),
        ),
    ],
)
def test_what_is_no_file_of_ours_is_refused_and_left_alone(
    tmp_path: Path, make: Callable[[Path], None], wrong: str
) -> None:
    make(lock_path(tmp_path))
    with pytest.raises(RefusedError, match=wrong):
        take(tmp_path)
    assert holder(tmp_path) is None
    if (tmp_path / "victim").exists():
        assert (tmp_path / "victim").read_text() == "precious"


def test_the_heartbeat_keeps_no_process_alive(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from trainer.core.run_lock import RunLock; RunLock(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=20)


def test_a_claim_whose_maker_died_is_passed_over(tmp_path: Path) -> None:
    claim = tmp_path / ".lock.claim-0"
    claim.touch()  # killed before it could say who it is
    began = time.monotonic()
    take(tmp_path).release()
    assert time.monotonic() - began > WATCH_SECONDS
    claim.write_bytes(Owner(**{**vars(Owner.new(Place.here(), INTERVAL_SECONDS)), "pid_started_ticks": 1}).record())
    began = time.monotonic()
    take(tmp_path).release()
    assert time.monotonic() - began < WATCH_SECONDS
    assert list(tmp_path.glob(".lock.claim*")) == []
