"""From what a step did to what is logged of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from trainer.config.batch_schedule import batch_size
from trainer.data.ledger import hash_text
from trainer.engine.base import StepResult
from trainer.telemetry.record import SourceRecord, StepRecord
from trainer.telemetry.throughput import StepTimes, peak_memory_bytes

if TYPE_CHECKING:
    from trainer.training.loop import Parts


def step_record(parts: Parts, result: StepResult, times: StepTimes, learning_rate: float) -> StepRecord:
    """Return the record of the step that the state has just counted."""
    state, compared = parts.state, parts.stragglers.newest
    samples = batch_size(parts.recipe.batch, state.step)
    speed = samples * parts.recipe.data.sequence_length / times.step_seconds
    return StepRecord(
        step=state.step,
        loss=result.loss,
        grad_norm=result.grad_norm,
        learning_rate=learning_rate,
        tokens=state.tokens,
        samples=state.consumed_samples,
        global_batch_size=samples,
        target_tokens=state.target_tokens,
        step_seconds=times.step_seconds,
        tokens_per_second=speed,
        model_flops_utilization=parts.utilization(speed),
        data_wait_seconds=times.data_wait_seconds,
        forward_backward_seconds=result.forward_backward_seconds,
        optimizer_seconds=result.optimizer_seconds,
        skipped=state.skipped_steps,
        memory_bytes=peak_memory_bytes(),
        corrupt_samples=state.corrupt_samples,
        slowest_rank_seconds=compared.slowest_seconds if compared else None,
        median_rank_seconds=compared.median_seconds if compared else None,
        slowest_rank=compared.slowest_rank if compared else None,
        batch_hash=hash_text(result.batch_digest),
        spikes=state.guard.spikes,
        rewinds=len(state.guard.rewound_at),
        time_unix=time.time(),
        sources=_source_records(parts, result),
    )


def _source_records(parts: Parts, result: StepResult) -> tuple[SourceRecord, ...]:
    labels = parts.loader.labels
    if len(labels) == 1:
        return ()
    consumed = parts.state.consumed_samples
    counts = parts.loader.sampler.counts_before(consumed)
    return tuple(
        SourceRecord(name=label, loss=loss / targets if targets else None, fraction=count / consumed)
        for label, loss, targets, count in zip(labels, result.source_losses, result.source_targets, counts, strict=True)
    )
