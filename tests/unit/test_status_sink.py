"""What status.json says while a run trains."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from trainer.evaluation.best import BestEvaluation
from trainer.telemetry.record import CheckpointRecord
from trainer.training.run_directory import RunDirectory
from trainer.training.status_sink import StatusSink

pytestmark = pytest.mark.fast


def test_a_rewind_takes_back_the_best_evaluation_of_what_it_left_behind() -> None:
    said: dict[str, Any] = {"best_validation_loss": 2.0, "best_step": 18}
    directory = cast("RunDirectory", SimpleNamespace(started=True, status=lambda **changes: said.update(changes)))
    StatusSink(directory, 9, 20)
    assert (said["best_validation_loss"], said["best_step"]) == (2.0, 18)
    StatusSink(directory, 9, 20, BestEvaluation("valid", 2.5, 5))
    assert (said["step"], said["best_validation_loss"], said["best_step"]) == (9, 2.5, 5)
    StatusSink(directory, 3, 20, BestEvaluation())
    assert (said["step"], said["best_validation_loss"], said["best_step"]) == (3, None, None)


def test_a_checkpoint_says_how_far_training_is() -> None:
    said: dict[str, Any] = {}
    directory = cast("RunDirectory", SimpleNamespace(started=True, status=lambda **changes: said.update(changes)))
    sink = StatusSink(directory, 0, 20)
    for step in range(1, 7):
        sink.step(cast("Any", SimpleNamespace(step=step, skipped=0, spikes=0, rewinds=0)))
    assert said["step"] == 0, "steps are written every few seconds"
    sink.checkpoint(CheckpointRecord(step=5, blocked_seconds=0.1, seconds=0.1, num_bytes=1, time_unix=0.0))
    assert (said["step"], said["last_checkpoint_step"]) == (6, 5), "training is ahead of what was committed"
