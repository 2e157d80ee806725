"""Event files as TensorBoard reads them: every step exactly once, however the run was killed."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_telemetry_record import evaluation_record, step_record

from trainer.telemetry.sinks.tensorboard import TensorBoardSink, event_files

pytestmark = pytest.mark.fast


def write_run(directory: Path, first: int, last: int, resume_step: int, loss: float) -> None:
    sink = TensorBoardSink(directory, resume_step)
    if first == 1:
        sink.evaluation(evaluation_record(0, validation_loss=loss))
    for step in range(first, last + 1):
        sink.step(step_record(step, loss=loss))
        if step % 5 == 0:
            sink.evaluation(evaluation_record(step, validation_loss=loss))
    sink.close()


def curve(directory: Path, tag: str, purge: bool = True) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(directory), purge_orphaned_data=purge)
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def tear(path: Path, missing_bytes: int) -> None:
    os.truncate(path, path.stat().st_size - missing_bytes)


def test_scalars_and_tags_are_read_back(tmp_path: Path) -> None:
    record = step_record(1, loss=2.5, model_flops_utilization=0.5)
    sink = TensorBoardSink(tmp_path, 0)
    sink.step(record)
    accumulator = EventAccumulator(str(tmp_path)).Reload()  # before close: nothing waits in a buffer
    assert set(accumulator.Tags()["scalars"]) == {tag for tag, _ in record.scalars()}
    for tag, value in record.scalars():
        (event,) = accumulator.Scalars(tag)
        assert event.value == pytest.approx(value, rel=1e-6)
        assert (event.step, event.wall_time) == (1, record.time_unix)
    sink.close()
    sink.close()


@pytest.mark.parametrize("missing_bytes", [0, 1, 5, 300])
@pytest.mark.parametrize("purge", [True, False])
def test_overlap_and_torn_tail_are_gone_after_resume(tmp_path: Path, missing_bytes: int, purge: bool) -> None:
    write_run(tmp_path, 1, 12, 0, loss=1.0)
    tear(event_files(tmp_path)[-1], missing_bytes)
    write_run(tmp_path, 6, 15, 5, loss=2.0)
    tear(event_files(tmp_path)[-1], missing_bytes)
    write_run(tmp_path, 11, 20, 10, loss=3.0)
    value = {step: 1.0 if step <= 5 else 2.0 if step <= 10 else 3.0 for step in range(21)}
    # Without the purge as well: readers that don't know it (the Rust loader) must see the same.
    assert curve(tmp_path, "train/loss", purge) == [(step, value[step]) for step in range(1, 21)]
    assert curve(tmp_path, "validation/code/loss", purge) == [(step, value[step]) for step in (0, 5, 10, 15, 20)]


def test_resume_further_back_than_an_earlier_resume(tmp_path: Path) -> None:
    write_run(tmp_path, 1, 12, 0, loss=1.0)
    write_run(tmp_path, 11, 14, 10, loss=2.0)
    write_run(tmp_path, 6, 16, 5, loss=3.0)
    assert curve(tmp_path, "train/loss") == [(step, 1.0 if step <= 5 else 3.0) for step in range(1, 17)]


def test_a_fresh_start_keeps_nothing(tmp_path: Path) -> None:
    write_run(tmp_path, 1, 12, 0, loss=1.0)
    write_run(tmp_path, 1, 5, 0, loss=2.0)
    assert curve(tmp_path, "train/loss") == [(step, 2.0) for step in range(1, 6)]
    assert curve(tmp_path, "validation/code/loss") == [(0, 2.0), (5, 2.0)]


@pytest.mark.parametrize("resume_steps", [(5,), (10, 5), (5, 5), (10, 0), (0, 0), (5, 8)])
def test_a_tensorboard_that_was_watching_drops_superseded_steps(tmp_path: Path, resume_steps: tuple[int, ...]) -> None:
    write_run(tmp_path, 1, 12, 0, loss=1.0)
    watching = EventAccumulator(str(tmp_path))
    assert len(watching.Reload().Scalars("train/loss")) == 12
    for resume_step in resume_steps:
        write_run(tmp_path, resume_step + 1, resume_step + 4, resume_step, loss=2.0)
        watching.Reload()
        assert [event.step for event in watching.Scalars("train/loss")] == list(range(1, resume_step + 5))


def test_files_sort_by_start_whatever_the_clock_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_800_000_000.0
    for start, drift in enumerate((0.0, 0.0, -3600.0)):
        monkeypatch.setattr(time, "time", lambda drift=drift: now + drift)
        write_run(tmp_path, 3 * start + 1, 3 * start + 3, 3 * start, loss=1.0)
        (tmp_path / f"mark{start}").write_text(event_files(tmp_path)[-1].name)
    marks = [(tmp_path / f"mark{start}").read_text() for start in range(3)]
    assert marks == sorted(set(marks)) == [path.name for path in event_files(tmp_path)]


def test_damage_in_the_middle_keeps_what_a_reader_could_see(tmp_path: Path) -> None:
    write_run(tmp_path, 1, 4, 0, loss=1.0)
    (path,) = event_files(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content + b"\0" * 4096)  # what a power cut leaves on some file systems
    TensorBoardSink(tmp_path, 10).close()
    assert path.read_bytes() == content


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 1e300])
def test_what_is_not_finite_is_drawn_not_raised(tmp_path: Path, loss: float) -> None:
    sink = TensorBoardSink(tmp_path, 0)
    sink.step(step_record(1, loss=1.0))
    sink.step(step_record(2, loss=loss))
    sink.step(step_record(3, loss=1.0))
    sink.close()
    points = curve(tmp_path, "train/loss")
    assert [step for step, _ in points] == [1, 2, 3]
    assert not math.isfinite(points[1][1])


def test_kill_minus_nine_then_resume(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_telemetry_record import step_record
from trainer.telemetry.sinks.tensorboard import TensorBoardSink
sink = TensorBoardSink(Path(sys.argv[1]), 0)
for step in range(1, 100_000):
    sink.step(step_record(step, loss=1.0))
    print(step, flush=True)
"""
    arguments = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = 0
    for line in process.stdout:
        last = int(line)
        if last == 60:
            process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    # What was handed over before the kill is there: nothing waited for a flush.
    before = [step for step, _ in curve(tmp_path, "train/loss")]
    assert before[:last] == list(range(1, last + 1))
    write_run(tmp_path, 51, 70, 50, loss=2.0)
    assert curve(tmp_path, "train/loss") == [(step, 1.0 if step <= 50 else 2.0) for step in range(1, 71)]
