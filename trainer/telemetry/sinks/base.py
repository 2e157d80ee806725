"""What a sink is, and the two that stand between the loop and the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from trainer.telemetry.record import CheckpointRecord, EvaluationRecord, GoodputRecord, StepRecord

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Somewhere records go. Methods may raise; :class:`Fanout` keeps that away from training."""

    def step(self, record: StepRecord) -> None:
        """Take one optimizer step."""
        ...

    def evaluation(self, record: EvaluationRecord) -> None:
        """Take one evaluation."""
        ...

    def checkpoint(self, record: CheckpointRecord) -> None:
        """Take one committed checkpoint."""
        ...

    def goodput(self, record: GoodputRecord) -> None:
        """Take where the run's time went so far."""
        ...

    def message(self, text: str) -> None:
        """Take a sentence for the user."""
        ...

    def close(self) -> None:
        """Let go of files and of the terminal. May be called twice."""
        ...


class Fanout:
    """Hand every record to every sink. A sink that fails is reported once, tried again, and never stops training."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)
        self._reported: set[int] = set()

    def step(self, record: StepRecord) -> None:
        """Hand one optimizer step to every sink."""
        self._each(lambda sink: sink.step(record))

    def evaluation(self, record: EvaluationRecord) -> None:
        """Hand one evaluation to every sink."""
        self._each(lambda sink: sink.evaluation(record))

    def checkpoint(self, record: CheckpointRecord) -> None:
        """Hand one checkpoint to every sink."""
        self._each(lambda sink: sink.checkpoint(record))

    def goodput(self, record: GoodputRecord) -> None:
        """Hand the goodput to every sink."""
        self._each(lambda sink: sink.goodput(record))

    def message(self, text: str) -> None:
        """Hand a sentence to every sink, and to the log."""
        logger.info("%s", text)
        self._each(lambda sink: sink.message(text))

    def replace(self, other: Fanout) -> None:
        """Hand records to the sinks of ``other`` from now on; those before have been closed."""
        self._sinks = other._sinks
        self._reported.clear()

    def close(self) -> None:
        """Close every sink."""
        self._each(lambda sink: sink.close())

    def _each(self, call: Callable[[Sink], None]) -> None:
        for index, sink in enumerate(self._sinks):
            try:
                call(sink)
            except Exception as error:  # noqa: BLE001 - whatever breaks in a display or a full disk, training goes on
                self._report(index, sink, error)

    def _report(self, index: int, sink: Sink, error: Exception) -> None:
        if index in self._reported:
            return
        self._reported.add(index)
        logger.warning("%s failed; training goes on, records may be missing there", sink, exc_info=error)
        self.message(f"warning: {sink} failed ({error}); training goes on, records may be missing there")


class Thinned:
    """Pass on step 1, every ``every_steps``-th step and the last one; evaluations and messages always."""

    def __init__(self, sink: Sink, every_steps: int, total_steps: int) -> None:
        self._sink = sink
        self._every_steps = every_steps
        self._total_steps = total_steps

    def __str__(self) -> str:
        return str(self._sink)

    def step(self, record: StepRecord) -> None:
        """Pass the step on if it is due."""
        if record.step in (1, self._total_steps) or record.step % self._every_steps == 0:
            self._sink.step(record)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Pass the evaluation on."""
        self._sink.evaluation(record)

    def checkpoint(self, record: CheckpointRecord) -> None:
        """Pass the checkpoint on."""
        self._sink.checkpoint(record)

    def goodput(self, record: GoodputRecord) -> None:
        """Pass the goodput on."""
        self._sink.goodput(record)

    def message(self, text: str) -> None:
        """Pass the sentence on."""
        self._sink.message(text)

    def close(self) -> None:
        """Close the sink behind."""
        self._sink.close()
