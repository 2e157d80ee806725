"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from trainer.config.optimizer import ScheduleConfig


def multiplier(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """Return what the peak learning rate is multiplied with for optimizer step ``step``, counted from 1.

    Warm-up is ``step / warmup_steps`` and reaches 1.0 at ``warmup_steps``. After it, cosine and linear fall to
    ``minimum_ratio`` at ``decay_steps`` (default: ``total_steps``) and stay there; wsd does so linearly over the last
    ``decay_ratio`` of those steps (Hu et al. 2024, https://arxiv.org/abs/2404.06395); inverse_sqrt is
    sqrt(warmup / step), never below the minimum (Vaswani et al. 2017, section 5.3); constant stays at 1.0.
    Raises ValueError for a step below 1.
    """
    if step < 1:
        raise ValueError(f"steps count from 1, got {step}")
    warmup = schedule.warmup_steps
    if step <= warmup:
        return step / warmup
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "inverse_sqrt":
        return max(schedule.minimum_ratio, math.sqrt(max(1, warmup) / step))
    end = schedule.decay_steps or total_steps
    if step >= end:
        return schedule.minimum_ratio
    start = warmup
    if schedule.name == "wsd":
        start = max(warmup, end - max(1, round(schedule.decay_ratio * end)))
        if step <= start:
            return 1.0
    progress = (step - start) / (end - start)
    remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1.0 - progress
    return schedule.minimum_ratio + (1.0 - schedule.minimum_ratio) * remaining
