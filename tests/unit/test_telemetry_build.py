"""Opening the sinks of a recipe, and keeping their failures away from training."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_telemetry_record import evaluation_record, step_record

from trainer.config.run import Recipe
from trainer.telemetry.build import build_sinks
from trainer.telemetry.record import CheckpointRecord, EvaluationRecord, GoodputRecord, StepRecord
from trainer.telemetry.sinks.base import Fanout, Sink, Thinned

pytestmark = pytest.mark.fast


def recipe(**telemetry: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"name": "demo", "directory": "runs/demo", "steps": 20},
            "model": {"config": {"model_type": "llama"}},
            "data": {"train": [{"path": "data/code"}], "sequence_length": 512},
            "batch": {"global_size": 16},
            "telemetry": telemetry,
        }
    )


class Recorder:
    def __init__(self, fails: bool = False) -> None:
        self.seen: list[object] = []
        self.fails = fails

    def __str__(self) -> str:
        return "the recorder"

    def _take(self, value: object) -> None:
        if self.fails:
            raise RuntimeError("broken")
        self.seen.append(value)

    def step(self, record: StepRecord) -> None:
        self._take(record.step)

    def evaluation(self, record: EvaluationRecord) -> None:
        self._take(record.name)

    def checkpoint(self, record: CheckpointRecord) -> None:
        self._take(record.step)

    def goodput(self, record: GoodputRecord) -> None:
        self._take(record.fraction)

    def message(self, text: str) -> None:
        self._take(text)

    def close(self) -> None:
        self._take("closed")


def feed(sinks: list[Sink], first: int, last: int) -> None:
    fanout = Fanout(sinks)
    for step in range(first, last + 1):
        fanout.step(step_record(step))
    fanout.evaluation(evaluation_record(last))
    fanout.close()


def steps_in(path: Path) -> list[int]:
    return [line["step"] for line in map(json.loads, path.open()) if "kind" not in line]


def test_one_failing_sink_is_reported_once_and_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    before, broken, after = Recorder(), Recorder(fails=True), Recorder()
    fanout = Fanout([before, broken, after])
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            fanout.step(step_record(step))
        fanout.evaluation(evaluation_record(3))
        fanout.close()
    for sink in (before, after):
        assert [value for value in sink.seen if not str(value).startswith("warning")] == [1, 2, 3, "code", "closed"]
        assert [str(value) for value in sink.seen if str(value).startswith("warning")] == [
            "warning: the recorder failed (broken); training goes on, records may be missing there"
        ]
    assert len([entry for entry in caplog.records if entry.levelno == logging.WARNING]) == 1


def test_all_sinks_failing_is_survived() -> None:
    fanout = Fanout([Recorder(fails=True), Recorder(fails=True)])
    fanout.step(step_record(1))
    fanout.message("hello")
    fanout.close()


def test_thinned_passes_first_every_nth_and_last() -> None:
    recorder = Recorder()
    sink = Thinned(recorder, 5, 12)
    for step in range(1, 13):
        sink.step(step_record(step))
    assert recorder.seen == [1, 5, 10, 12]


def test_files_of_a_run(tmp_path: Path) -> None:
    stream = io.StringIO()
    feed(build_sinks(recipe(log_every_steps=5), tmp_path, 0, 20, stream), 1, 17)
    feed(build_sinks(recipe(log_every_steps=5), tmp_path, 10, 20, stream), 11, 20)
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 5, 10, 15, 20]
    scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in scalars] == [1, 5, 10, 15, 20]
    assert "step 11/20 " in stream.getvalue()  # the console sees every step


def test_tensorboard_can_be_switched_off(tmp_path: Path) -> None:
    feed(build_sinks(recipe(tensorboard=False), tmp_path, 0, 3, io.StringIO()), 1, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_unwritable_places_are_reported_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where the directory should be")
    (tmp_path / "metrics.jsonl").mkdir()
    stream = io.StringIO()
    feed(build_sinks(recipe(), tmp_path, 0, 3, stream), 1, 3)
    text = stream.getvalue()
    assert text.count("warning: metrics.jsonl is not written: ") == 1
    assert text.count("warning: tensorboard is not written: ") == 1
    assert "step 3/3 " in text


def test_a_console_that_went_away_does_not_stop_the_files(tmp_path: Path) -> None:
    stream = io.StringIO()
    sinks = build_sinks(recipe(), tmp_path, 0, 3, stream)
    stream.close()
    feed(sinks, 1, 3)
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3]
