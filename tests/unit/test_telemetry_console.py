"""What a person sees: plain lines in a file, one live line on a terminal."""

from __future__ import annotations

import fcntl
import io
import math
import os
import re
import struct
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import pytest
from test_telemetry_record import evaluation_record, step_record

from trainer.telemetry.sinks.console import PlainSink, TerminalSink, console_sink

pytestmark = pytest.mark.fast

STEP_LINE = re.compile(
    r"step (\d+)/\d+ loss=(\S+) grad_norm=\S+ learning_rate=\S+ tokens_per_second=\d+( mfu=\S+)?( skipped=\d+)? eta=\S+"
)


class Clock:
    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def run_plain(first: int, last: int, total: int, seconds_per_step: float) -> list[str]:
    stream, clock = io.StringIO(), Clock()
    sink = PlainSink(stream, first - 1, total, clock)
    for step in range(first, last + 1):
        clock.seconds += seconds_per_step
        sink.step(step_record(step, step_seconds=seconds_per_step, tokens_per_second=512 / seconds_per_step))
    sink.close()
    sink.close()
    return stream.getvalue().splitlines()


def steps_of(lines: list[str]) -> list[int]:
    matches = [STEP_LINE.fullmatch(line) for line in lines]
    assert all(matches), lines
    return [int(match.group(1)) for match in matches if match]


def test_short_runs_print_every_step() -> None:
    assert steps_of(run_plain(1, 10, 10, 0.01)) == list(range(1, 11))


def test_fast_runs_are_throttled_by_steps() -> None:
    assert steps_of(run_plain(1, 1000, 1000, 0.01)) == [1, *range(50, 1001, 50)]


def test_slow_runs_print_every_ten_seconds() -> None:
    steps = steps_of(run_plain(1, 90, 100_000, 1.0))
    assert steps == [1, *range(11, 90, 10), 90]


def test_first_and_last_step_of_a_resumed_and_interrupted_run_are_printed() -> None:
    steps = steps_of(run_plain(313, 777, 10_000, 0.001))
    assert (steps[0], steps[-1]) == (313, 777)


def test_a_line_can_be_parsed_and_the_eta_is_right() -> None:
    lines = run_plain(1, 100, 400, 2.0)
    assert lines[-1].startswith("step 100/400 loss=5.5000 grad_norm=1.25 learning_rate=3.000e-04 ")
    assert " tokens_per_second=256 " in lines[-1]
    assert lines[-1].endswith(" eta=10m00s")  # 300 steps of 2 s


def test_the_eta_counts_pauses_but_not_the_start_up() -> None:
    stream, clock = io.StringIO(), Clock()
    sink = PlainSink(stream, 0, 4, clock)
    clock.seconds += 1000  # loading the model
    sink.step(step_record(1, step_seconds=1.0))
    clock.seconds += 3  # a step of 1 s and an evaluation of 2 s
    sink.step(step_record(2, step_seconds=1.0))
    assert [line.split("eta=")[1] for line in stream.getvalue().splitlines()] == ["3.0s", "4.0s"]


def test_evaluations_messages_and_bad_numbers_are_shown() -> None:
    stream = io.StringIO()
    sink = PlainSink(stream, 0, 10)
    sink.evaluation(evaluation_record(0))
    sink.message("checkpoint written")
    sink.step(step_record(1, loss=math.nan, grad_norm=math.inf, skipped=1, model_flops_utilization=0.5))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 0/10 validation=code loss=5.0000 perplexity=148.4 seconds=1.5"
    assert lines[1] == "checkpoint written"
    assert STEP_LINE.fullmatch(lines[2])
    assert "loss=nan grad_norm=inf" in lines[2]
    assert " mfu=0.500 skipped=1 " in lines[2]


def test_a_plain_stream_gets_no_escape_sequences() -> None:
    stream = io.StringIO()
    sink = console_sink(stream, "demo", 0, 3)
    assert isinstance(sink, PlainSink)
    sink.step(step_record(1))
    sink.close()
    assert "\x1b" not in stream.getvalue()


@contextmanager
def terminal(columns: int) -> Iterator[tuple[TextIO, list[bytes]]]:
    """Give a real pseudo-terminal and what is drawn on it, complete once the block is left."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    drawn: list[bytes] = []

    def read() -> None:
        while True:
            try:
                drawn.append(os.read(master, 65536))
            except OSError:  # the other end is closed
                return

    reader = threading.Thread(target=read)
    reader.start()
    with open(slave, "w", encoding="utf-8") as stream:
        yield stream, drawn
    reader.join(timeout=10)
    os.close(master)


def screen_lines(drawn: list[bytes]) -> list[str]:
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(drawn).decode())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_terminal_line_fits_and_tells_what_matters(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("COLUMNS", raising=False)
    clock = Clock()
    with terminal(columns) as (stream, drawn):
        sink = TerminalSink(stream, "demo", 0, 200, clock)
        for step in range(1, 201):
            clock.seconds += 0.5
            sink.step(step_record(step, loss=400 - step, model_flops_utilization=0.412, skipped=2))
            if step == 100:
                sink.evaluation(evaluation_record(100))
                sink.message("saved [bold]step-100[/bold]")
        sink.close()
        sink.close()
    lines = screen_lines(drawn)
    assert max(len(line) for line in lines) <= columns
    live = [line for line in lines if line.startswith("demo ")]
    assert "demo 100/200" in "".join(live)
    assert "200.0000" in live[-1]
    assert live[-1].endswith("done")
    assert any("50s left" in line for line in live)
    assert "saved [bold]step-100[/bold]" in lines  # user text is not markup
    assert "validation code" in " ".join(lines)
    if columns == 120:
        assert "lr 3.00e-04  1.02k tok/s  41.2% MFU  grad 1.25  2 skipped" in live[-1]
    # A killed run must not leave the terminal without a cursor.
    text = b"".join(drawn)
    assert text.rfind(b"\x1b[?25l") < text.find(b"\x1b[?25h") < text.find(b"loss")


@pytest.mark.parametrize(("term", "kind"), [("dumb", PlainSink), ("xterm", TerminalSink)])
def test_only_a_terminal_that_moves_its_cursor_gets_the_live_line(
    term: str, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    with terminal(80) as (stream, _):
        sink = console_sink(stream, "demo", 0, 3)
        assert type(sink) is kind
        sink.close()
