"""Everything that may ask this rank to stop, put together; and the measurements that the time limit is judged by."""

from __future__ import annotations

import os
from collections.abc import Callable

from trainer.config.run import Recipe
from trainer.resilience.control import Control
from trainer.resilience.deadline import Deadline, Durations
from trainer.resilience.job_end import Ask, JobEnd
from trainer.resilience.requests import RequestSources
from trainer.resilience.signals import StopFlag
from trainer.telemetry.record import CheckpointRecord, EvaluationRecord, GoodputRecord, StepRecord
from trainer.training.run_directory import RunDirectory


class DurationsSink:
    """Implements trainer.telemetry.sinks.base.Sink: notes how long things take."""

    def __init__(self, durations: Durations) -> None:
        self._durations = durations

    def step(self, record: StepRecord) -> None:
        """Note a step."""
        self._durations.note_step(record.step_seconds)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Note the evaluation of one source."""
        self._durations.note_evaluation(record.step, record.seconds)

    def checkpoint(self, record: CheckpointRecord) -> None:
        """Note a committed save."""
        self._durations.note_save(record.seconds)

    def goodput(self, record: GoodputRecord) -> None:
        """Nothing: no duration."""

    def message(self, text: str) -> None:
        """Nothing: sentences are for people."""

    def close(self) -> None:
        """Nothing to let go of."""


def request_sources(
    recipe: Recipe,
    total_steps: int,
    signals: StopFlag,
    directory: RunDirectory | None,
    job_end: Ask | None,
    durations: Durations,
    say: Callable[[str], None],
) -> RequestSources:
    """Return what this rank asks by; ``directory`` is given on rank 0, which alone looks at the clock and at files.

    ``job_end`` asks the scheduler when a job ends.
    """
    if directory is None:
        return RequestSources(signals)
    deadline = None
    last_save = directory.before.get("last_checkpoint_seconds")
    durations.save = last_save if isinstance(last_save, float) else None
    if recipe.resilience.deadline:
        end = JobEnd(os.environ, job_end)
        deadline = Deadline(end.unix, durations, recipe.launch.slurm.signal_seconds)
    control = Control(directory.path, total_steps, directory.before, directory.status, say)
    return RequestSources(signals, control=control, deadline=deadline, lost=lambda: directory.lost)
