"""The global batch as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

from bisect import bisect_left

from trainer.config.parallel import BatchConfig


def batch_size(batch: BatchConfig, step: int) -> int:
    """Return the sequences of optimizer step ``step``, counted from 1.

    A warm-up of n increments over ``steps`` steps adds increment k (1 to n) after ``k * steps / n`` steps, rounded up:
    step 1 has ``start_size``, step ``steps + 1`` is the first of ``global_size``. Raises ValueError for a step below 1.
    """
    if step < 1:
        raise ValueError(f"steps count from 1, got {step}")
    warmup = batch.warmup
    if warmup is None or step > warmup.steps:
        return batch.global_size
    increments = (batch.global_size - warmup.start_size) // warmup.increment
    return warmup.start_size + warmup.increment * ((step - 1) * increments // warmup.steps)


def samples_through(batch: BatchConfig, step: int) -> int:
    """Return the sequences of steps 1 to ``step`` together: the number of the first sample of step ``step + 1``."""
    warmup = batch.warmup
    if warmup is None:
        return step * batch.global_size
    increments = (batch.global_size - warmup.start_size) // warmup.increment
    # Each increment counts from the step it is added at on.
    added_after = (-(-k * warmup.steps // increments) for k in range(1, increments + 1))
    return step * warmup.start_size + warmup.increment * sum(max(0, step - after) for after in added_after)


def steps_for(batch: BatchConfig, samples: int) -> int:
    """Return the smallest number of steps that read at least ``samples`` sequences."""
    warm = batch.warmup.steps if batch.warmup is not None else 0
    rest = samples - samples_through(batch, warm)
    if rest > 0:
        return warm + -(-rest // batch.global_size)
    return bisect_left(range(warm + 1), samples, key=lambda step: samples_through(batch, step))


def warmup_text(batch: BatchConfig) -> str:
    """Return what is to be said of the warm-up behind the full size, nothing where there is none."""
    warmup = batch.warmup
    if warmup is None:
        return ""
    return f" after a warm-up from {warmup.start_size} by {warmup.increment} over {warmup.steps} steps"
