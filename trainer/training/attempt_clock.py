"""Keep RUN/attempts/NNNN/timing.json: what this start spends its time on."""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from trainer.core.environ import allocated_since, process_started_unix, slurm_job
from trainer.telemetry.attempt_files import close_books, write_times
from trainer.telemetry.attempt_times import AttemptTimes
from trainer.telemetry.goodput import Goodput, goodput
from trainer.telemetry.record import CheckpointRecord, EvaluationRecord, GoodputRecord, StepRecord

_SECONDS_BETWEEN_WRITES = 5.0


class AttemptClock:
    """Rank 0's account of its time. A thread writes the file, so that it also tells how long a hang lasted."""

    def __init__(self, run_directory: Path, attempt: int, world_size: int, launch: str) -> None:
        """Begin to count; nothing is written before :meth:`start`."""
        self._run_directory = run_directory
        _, job, restarts = slurm_job(os.environ) or ("", "", 0)
        started = process_started_unix()
        self.times = AttemptTimes(
            attempt=attempt, world_size=world_size, launch=launch, slurm_job_id=job, slurm_restarts=restarts,
            started_unix=started, allocated_since_unix=min(started, allocated_since(os.environ) or started),
        )  # fmt: skip
        self._before: list[AttemptTimes] = []
        self._counting, self._writing = threading.Lock(), threading.Lock()
        self._wake, self._closed = threading.Event(), False
        self._thread: threading.Thread | None = None

    def begin(self, resumed_step: int, restore_seconds: float, nodes: int) -> None:
        """Note where the run goes on, at first or after a rewind. To be called before metrics.jsonl is cut back."""
        if self.times.resumed_step is not None:
            with self._counting:
                self.times.go_back(resumed_step)
                self.times.rewind_restore_seconds += restore_seconds
            self._wake.set()
            return
        self._before = close_books(self._run_directory)
        with self._counting:
            self.times.resumed_step = self.times.base_step = self.times.last_step = resumed_step
            self.times.restore_seconds, self.times.nodes = restore_seconds, nodes

    def start(self) -> None:
        """Write the file, and again every few seconds. The attempt's directory is there."""
        self._write()
        self._thread = threading.Thread(target=self._keep, name="attempt clock", daemon=True)
        self._thread.start()

    def step(self, record: StepRecord) -> None:
        """Count a step."""
        with self._counting:
            self.times.add_step(record.step, record.step_seconds, record.time_unix)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Count an evaluation."""
        with self._counting:
            self.times.evaluation_seconds += record.seconds

    def checkpoint(self, record: CheckpointRecord) -> None:
        """Count a save that was committed, and let it be written at once."""
        with self._counting:
            self.times.saves += 1
            self.times.save_seconds += record.blocked_seconds
            self.times.durable_seconds += record.seconds
        self._wake.set()

    def end(self, outcome: str, reason: str | None) -> None:
        """Note how the attempt ends."""
        self.times.outcome, self.times.reason = outcome, reason
        self._write()

    def goodput(self) -> Goodput | None:
        """Return the goodput of the run up to now; None before :meth:`begin`."""
        return goodput([*self._before, self._snapshot()]) if self.times.resumed_step is not None else None

    def close(self) -> None:
        """Write the file a last time, if it ever was. May be called twice."""
        self._closed = True
        self._wake.set()
        if self._thread is not None:
            self._write()
            self._thread = None

    def _keep(self) -> None:
        while True:
            self._wake.wait(_SECONDS_BETWEEN_WRITES)
            self._wake.clear()
            if self._closed:
                return
            self._write()

    def _write(self) -> None:
        with self._writing:  # the thread's write and the last one use the same temporary name
            write_times(self._run_directory, self._snapshot())

    def _snapshot(self) -> AttemptTimes:
        with self._counting:
            self.times.updated_unix = time.time()
            if self.times.outcome is not None:
                self.times.ended_unix = self.times.updated_unix
            return copy.deepcopy(self.times)


class GoodputSink:
    """Implements trainer.telemetry.sinks.base.Sink: feeds the clock, and draws the goodput at every checkpoint."""

    def __init__(self, clock: AttemptClock, draw: Callable[[GoodputRecord], None]) -> None:
        """``draw`` hands a record to the other sinks."""
        self._clock = clock
        self._draw = draw
        self._drawn_step = -1

    def step(self, record: StepRecord) -> None:
        """Count the step."""
        self._clock.step(record)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Count the evaluation."""
        self._clock.evaluation(record)

    def checkpoint(self, record: CheckpointRecord) -> None:
        """Count the save and draw the goodput at the step that is done by now: once a step, as every curve."""
        self._clock.checkpoint(record)
        found, step = self._clock.goodput(), self._clock.times.last_step
        if found is not None and step != self._drawn_step:
            self._drawn_step = step
            self._draw(goodput_record(found, step, time.time()))

    def goodput(self, record: GoodputRecord) -> None:
        """Nothing: it comes from here."""

    def message(self, text: str) -> None:
        """Nothing: sentences are for people."""

    def close(self) -> None:
        """Nothing: the clock goes on until the directory is released."""


def goodput_record(found: Goodput, step: int, now_unix: float) -> GoodputRecord:
    """Return what is drawn of a run's goodput."""
    return GoodputRecord(
        step=step,
        fraction=found.fraction,
        restarts=found.restarts,
        lost_steps=found.lost_steps,
        redone_seconds=found.redone_seconds,
        startup_seconds=found.startup_seconds,
        restore_seconds=found.restore_seconds,
        save_seconds=found.save_seconds,
        evaluation_seconds=found.evaluation_seconds,
        other_seconds=found.other_seconds,
        time_unix=now_unix,
    )
