"""How a global batch and a model are divided over ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from trainer.config.section import Section, broken_rule


class BatchWarmupConfig(Section):
    """Smaller global batches at the start of the run, a pure function of the step."""

    start_size: int = Field(ge=1)
    """Sequences of the first optimizer step, over all ranks."""
    increment: int = Field(ge=1)
    """Sequences added at a time; ``global_size`` is reached in whole increments."""
    steps: int = Field(ge=1)
    """Optimizer steps until ``global_size`` is reached, shared equally by the smaller sizes."""


class BatchConfig(Section):
    """Sizes in sequences. Gradient accumulation is derived: global = micro x accumulation x data-parallel."""

    global_size: int = Field(ge=1)
    """Sequences per optimizer step, over all ranks. Never changes with the number of ranks."""
    micro_size: int = Field(default=1, ge=1)
    """Sequences per forward pass on one rank."""
    warmup: BatchWarmupConfig | None = None
    """Grow the global batch to ``global_size`` step by step. Null: it has this size from the first step on."""

    @field_validator("warmup")
    @classmethod
    def _check_warmup(cls, warmup: BatchWarmupConfig | None, info: ValidationInfo) -> BatchWarmupConfig | None:
        size: int | None = info.data.get("global_size")
        if warmup is None or size is None:
            return warmup
        start, increment = warmup.start_size, warmup.increment
        if start >= size:
            rule = f"{start} is not below batch.global_size = {size}: there is nothing to warm up"
            raise broken_rule(rule, f"use less than {size}, or remove batch.warmup", key="start_size")
        if (size - start) % increment:
            below = max(step for step in range(1, increment) if (size - start) % step == 0)
            rule = f"{increment} does not lead from {start} to batch.global_size = {size} in whole increments"
            raise broken_rule(rule, f"use {below}, or any divisor of {size - start}", key="increment")
        if warmup.steps < (needed := (size - start) // increment):
            rule = f"{warmup.steps} steps are too few for the {needed} sizes below batch.global_size"
            raise broken_rule(rule, f"use at least {needed}, or a larger increment", key="steps")
        return warmup


class MemoryConfig(Section):
    """Trades of memory against time or precision."""

    activation_checkpointing: Literal["none", "full"] = "none"
    """``full`` recomputes every transformer block in the backward pass."""
    tiled_loss: int | None = Field(default=None, ge=1)
    """Tokens of a sequence whose logits are held at a time; they are recomputed in the backward pass."""
    tiled_mlp: int | None = Field(default=None, ge=1)
    """Tokens of a sequence that an MLP computes at a time; what is inside of it is recomputed in the backward pass."""
    gradient_accumulation_dtype: Literal["float32"] = "float32"
    """Dtype gradients are summed in; bfloat16 is not numerically safe and is refused."""


class ParallelConfig(Section):
    """Degrees of the mesh; what is left of the world size is data-parallel."""

    pipeline: int = Field(default=1, ge=1)
    """Pipeline stages."""
    tensor: int = Field(default=1, ge=1)
    """Tensor-parallel ranks per layer."""
    sequence: int = Field(default=1, ge=1)
    """Ranks a sequence is split over."""
    expert: int = Field(default=1, ge=1)
    """Ranks the experts of a mixture are spread over."""
    balance: Literal["flops", "parameters", "time", "layers"] = "flops"
    """What pipeline stages are balanced by; ``time`` is measured at the start."""
