"""How a global batch and a model are divided over ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.config.section import Section


class BatchConfig(Section):
    """Sizes in sequences. Gradient accumulation is derived: global = micro x accumulation x data-parallel."""

    global_size: int = Field(ge=1)
    """Sequences per optimizer step, over all ranks. Never changes with the number of ranks."""
    micro_size: int = Field(default=1, ge=1)
    """Sequences per forward pass on one rank."""


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
