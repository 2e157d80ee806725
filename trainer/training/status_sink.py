"""Keep status.json up to date while training."""

from __future__ import annotations

import time

from trainer.evaluation.best import BestEvaluation
from trainer.telemetry.record import CheckpointRecord, EvaluationRecord, GoodputRecord, StepRecord
from trainer.training.run_directory import RunDirectory

_SECONDS_BETWEEN_WRITES = 5.0


class StatusSink:
    """Implements trainer.telemetry.sinks.base.Sink: step, speed and checkpoints into status.json."""

    def __init__(
        self, directory: RunDirectory, resume_step: int, total_steps: int, best: BestEvaluation | None = None
    ) -> None:
        """``best`` is that of the state that a rewind went back to; None: this is the start."""
        self._directory = directory
        self._written = time.monotonic()
        self._events = (0, 0, 0)
        self._step = resume_step
        last = resume_step or None
        first = {} if directory.started else {"resumed_step": resume_step}  # a rewind is no other start
        directory.status(state="running", step=resume_step, total_steps=total_steps, last_checkpoint_step=last, **first)
        if best is not None:  # null: what was found since is of weights that are no more
            known = best.loss is not None
            directory.status(best_validation_loss=best.loss, best_step=best.step if known else None)

    def step(self, record: StepRecord) -> None:
        """Note the step; written at most every few seconds, but for what the guard did."""
        self._step = record.step
        events = record.skipped, record.spikes, record.rewinds
        if events != self._events:
            self._events = events
            skipped, spikes, rewinds = events
            self._directory.status(step=record.step, skipped_steps=skipped, spikes=spikes, rewinds=rewinds)
        if time.monotonic() - self._written >= _SECONDS_BETWEEN_WRITES:
            self._written = time.monotonic()
            self._directory.status(step=record.step, tokens_per_second=record.tokens_per_second, loss=record.loss)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Note the best evaluation; the others are in metrics.jsonl."""
        if record.best_step is not None:
            self._directory.status(best_validation_loss=record.best_validation_loss, best_step=record.best_step)

    def checkpoint(self, record: CheckpointRecord) -> None:
        """Note a committed checkpoint, at once; training may be steps ahead of it."""
        self._directory.status(
            step=max(self._step, record.step),
            last_checkpoint_step=record.step,
            last_checkpoint_seconds=record.seconds,
            last_checkpoint_blocked_seconds=record.blocked_seconds,
        )

    def goodput(self, record: GoodputRecord) -> None:
        """Nothing: every write of status.json says it."""

    def message(self, text: str) -> None:
        """Nothing: sentences are for people."""

    def close(self) -> None:
        """Nothing to let go of."""
