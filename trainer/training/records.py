"""From what a step did to what is logged of it."""

from __future__ import annotations

import time
from collections.abc import Callable

from trainer.config.derive import Derived
from trainer.engine.base import StepResult
from trainer.telemetry.record import StepRecord
from trainer.telemetry.throughput import StepTimes, peak_memory_bytes
from trainer.training.state import TrainState


def step_record(
    derived: Derived,
    state: TrainState,
    result: StepResult,
    times: StepTimes,
    learning_rate: float,
    utilization: Callable[[float], float | None],
) -> StepRecord:
    """Return the record of the step that ``state`` has just counted. ``utilization``: tokens per second → MFU."""
    speed = derived.tokens_per_step / times.step_seconds
    return StepRecord(
        step=state.step,
        loss=result.loss,
        grad_norm=result.grad_norm,
        learning_rate=learning_rate,
        tokens=state.tokens,
        samples=state.consumed_samples,
        target_tokens=state.target_tokens,
        step_seconds=times.step_seconds,
        tokens_per_second=speed,
        model_flops_utilization=utilization(speed),
        data_wait_seconds=times.data_wait_seconds,
        forward_backward_seconds=result.forward_backward_seconds,
        optimizer_seconds=result.optimizer_seconds,
        skipped=state.skipped_steps,
        memory_bytes=peak_memory_bytes(),
        time_unix=time.time(),
    )
