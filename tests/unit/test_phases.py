"""The board that a rank writes on and its supervisor reads."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from typing import Literal

import pytest

from trainer.core import phases
from trainer.core.phases import Board
from trainer.telemetry.throughput import StepClock

pytestmark = pytest.mark.fast


def test_a_forked_writer_is_read_as_it_wrote() -> None:
    board = Board()
    pid = os.fork()
    if pid == 0:
        board.mark("backward", step=7, micro_batch=3, detail="x" * 500)
        board.leave(board.enter("all_reduce", "2", 1024))
        board.enter("broadcast", "", 5)
        board.read_begins("/data/" + "long/" * 100 + "ü.bin")
        board.note_exception(ValueError("first"), "Traceback", told=False, exit_code=93)
        board.note_exception(RuntimeError("echo"), "", told=True)
        os._exit(0)
    os.waitpid(pid, 0)
    seen = board.snapshot()
    assert (seen.phase, seen.step, seen.micro_batch, seen.detail) == ("backward", 7, 3, "x" * 192)
    assert seen.collective is not None
    assert (seen.collective.name, seen.collective.group, seen.collective.number) == ("broadcast", "", 1)
    assert (seen.collective.elements, seen.collective.inside) == (5, True)
    assert seen.reading.endswith("/ü.bin")
    assert seen.raised is not None
    assert (seen.raised.type, seen.raised.message, seen.raised.told) == ("ValueError", "first", False)
    assert seen.raised.exit_code == 93


def test_no_reader_sees_half_of_a_record() -> None:
    board = Board()
    pid = os.fork()
    if pid == 0:
        number = 0
        while True:
            number += 1
            board.mark("data", step=number, micro_batch=number % 1000, detail=str(number) * 20)
    try:
        end, seen = time.monotonic() + 1.0, set[int]()
        while time.monotonic() < end:
            got = board.snapshot()
            if got.phase == "start":
                continue
            assert got.micro_batch == got.step % 1000
            assert got.detail == (str(got.step) * 20)[:192]
            seen.add(got.step)
        assert len(seen) > 10
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_allowances_follow_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    board = Board(start_seconds=1000, slow_seconds=20)

    def spend(phase, seconds: float, **given: object) -> float:
        board.mark(phase, **given)
        allowed = board.snapshot().allowed_seconds
        now[0] += seconds
        return allowed

    assert spend("data", 1, step=1) == 1000  # nothing is known of the first step
    assert spend("forward", 5) == 1000
    assert spend("log", 1) == 1000
    assert spend("evaluate", 9) == 1000
    assert spend("save", 2) == 1000
    assert spend("data", 1, step=2) == 7  # evaluation and save are no part of the step
    assert spend("forward", 2) == 7
    assert spend("evaluate", 1) == 27  # three times the longest, or slow_seconds
    assert spend("save", 1) == 20
    assert spend("stop", 1) == 20
    board.mark("stop", allowed_seconds=600)
    assert board.snapshot().allowed_seconds == 600


def test_threads_beside_say_nothing_of_the_loop() -> None:
    import threading

    board = Board()
    board.leave(board.enter("all_reduce", "", 1))

    def save() -> None:
        board.quiet_threads.add(threading.get_ident())
        board.leave(board.enter("gather", "7", 1))

    thread = threading.Thread(target=save)
    thread.start()
    thread.join()
    found = board.snapshot().collective
    assert found is not None
    assert found.name == "all_reduce"


def measure_steps(kind: Literal["stop", "C"], answers: Connection) -> None:
    """Measure a step in whose middle this process is stopped for 4 s, or in a call in C that holds the GIL so long."""
    board, clock = phases.new_board(1000, 20), StepClock()
    board.beat(0)
    time.sleep(1.2)
    board.mark("data", step=1)
    clock.start_step()
    board.mark("forward")
    call = board.enter("all_reduce", "", 1)
    answers.send("begun")
    if kind == "C":
        ctypes.PyDLL(None).usleep(4_000_000)  # idle: it burns as little time as a suspended process
    else:
        time.sleep(0.5)
    board.leave(call)
    times = clock.finish_step()
    board.mark("data", step=2)
    answers.send((times.step_seconds, board.waited_seconds, board.snapshot().allowed_seconds))


@pytest.mark.parametrize(("kind", "least", "most"), [("stop", 0.3, 2.5), ("C", 3.9, 10.0)])
def test_a_suspended_process_is_in_no_step_and_a_long_call_in_c_is(
    kind: Literal["stop", "C"], least: float, most: float
) -> None:
    spawn = multiprocessing.get_context("spawn")
    answers, there = spawn.Pipe()
    process = spawn.Process(target=measure_steps, args=(kind, there))
    process.start()
    try:
        assert answers.recv() == "begun"
        if kind == "stop":
            assert process.pid is not None
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(4)
            os.kill(process.pid, signal.SIGCONT)
        found = answers.recv()
    finally:
        process.kill()
        process.join()
    assert all(least < seconds < most for seconds in found), found
