"""Fill what an engine holds from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from trainer.engine.base import StateReader, StateSlice
from trainer.engine.optimizers import set_optimizer_steps


def load_slices(
    slices: Iterable[StateSlice], reader: StateReader, optimizer: torch.optim.Optimizer, optimizer_steps: int | None
) -> None:
    """Read every slice; ``optimizer_steps`` None: weights only."""
    for piece in slices:
        if optimizer_steps is None and piece.key != "weight":
            continue
        piece.fill(reader.read(piece.name, piece.key, piece.start, piece.count, piece.cut))
    if optimizer_steps is not None:
        set_optimizer_steps(optimizer, optimizer_steps)
