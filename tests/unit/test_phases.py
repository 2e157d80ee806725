"""The board that a rank writes on and its supervisor reads."""

from __future__ import annotations

import os
import time

import pytest

from trainer.core.phases import Board

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
