"""Fill what an engine holds from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from trainer.engine.base import StateReader, StateSlice
from trainer.engine.optimizers import set_optimizer_steps

_AT_A_TIME = 1 << 22
"""Elements that are read at a time: an embedding may have a billion, and memory is full already."""


def load_slices(
    slices: Iterable[StateSlice], reader: StateReader, optimizer: torch.optim.Optimizer, optimizer_steps: int | None
) -> None:
    """Read every slice; ``optimizer_steps`` None: weights only."""
    for piece in slices:
        if optimizer_steps is None and piece.key != "weight":
            continue
        # What lies on another medium is brought into memory as a whole.
        step = _AT_A_TIME if isinstance(piece.held, torch.Tensor) else max(1, piece.count)
        for low in range(0, piece.count, step):
            count = min(step, piece.count - low)
            values = reader.read(piece.name, piece.key, piece.start + low, count, piece.cut)
            if isinstance(piece.held, torch.Tensor):
                piece.held.narrow(0, low, count).copy_(values)
            else:
                piece.fill(values)
    if optimizer_steps is not None:
        set_optimizer_steps(optimizer, optimizer_steps)
