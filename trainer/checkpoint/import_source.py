"""What is imported, wherever it comes from: logical tensors that are read when they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True)
class ForeignTensor:
    """A whole logical tensor of another checkpoint; ``read`` returns it in its shape, on the CPU."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> ForeignTensor:
        """Return one that is in memory, or mapped."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


@dataclass
class Source:
    """The contents of a foreign checkpoint, under the names that it has there."""

    path: str
    kind: str
    """What it is, in words, e.g. "DeepSpeed ZeRO-2 of 4 ranks, tag global_step100"."""
    weights: dict[str, ForeignTensor]
    """Every parameter: the float32 master where there is one."""
    buffers: dict[str, ForeignTensor] = field(default_factory=dict)
    moments: dict[str, dict[str, ForeignTensor]] = field(default_factory=dict)
    """Of trained parameters, by state key; empty: weights only."""
    frozen: set[str] = field(default_factory=set)
    """Parameters that are known not to have been trained."""
    shared: dict[str, str] = field(default_factory=dict)
    """Names that are another one's tensor, by what the source says."""
    rounded: dict[str, ForeignTensor] = field(default_factory=dict)
    """Compute weights that the source holds beside their masters: the masters, rounded."""
    step: int = 0
    optimizer_steps: int = 0
    dtype: str = "float32"
    """What it computed in: float32 or bfloat16."""
    notes: list[str] = field(default_factory=list)
    """What the user should know."""
    directory: Path | None = None
    """Where a config.json may lie."""

    def tensors(self) -> Iterator[tuple[str, str, ForeignTensor]]:
        """Yield (name, state key, tensor) of everything."""
        for name, tensor in (self.weights | self.buffers).items():
            yield name, "weight", tensor
            for key, moment in self.moments.get(name, {}).items():
                yield name, key, moment
