"""Let the number of micro-batches change from step to step (DeepSpeed 0.19.8).

``set_train_batch_size`` changes the accumulation, but a step ends where the count of all micro-batches since the start
is a multiple of it: after a step of one micro-batch the first of two would end the next step, with half its gradient.
Test: tests/distributed/test_batch_warmup.py, test_upstream.py.
"""

from __future__ import annotations

from deepspeed.runtime.engine import DeepSpeedEngine


def set_accumulation(engine: DeepSpeedEngine, num_micro_batches: int) -> None:
    """Tell DeepSpeed, between two steps, how many micro-batches per rank the next one has."""
    if num_micro_batches != engine.gradient_accumulation_steps():
        engine.set_train_batch_size(num_micro_batches * engine.train_micro_batch_size_per_gpu() * engine.dp_world_size)
        engine.micro_steps = 0
