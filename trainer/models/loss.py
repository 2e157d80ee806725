"""What is minimised: the type that tasks hand down and the engine applies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from trainer.core.targets import IGNORE_INDEX


@dataclass(frozen=True)
class LossSpec:
    """Head, mask and reduction of a task.

    ``function(logits, targets)`` returns one *sum* over counted targets a row, in float32: the engine divides by the
    number of targets of the whole global batch, so that the gradient does not depend on how the batch is split, and
    tells the sources of rows apart.
    """

    name: str
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def cross_entropy_by_row(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed cross-entropy of each row, float32 [batch].

    ``logits`` is [batch, sequence, vocabulary], ``targets`` [batch, sequence].
    """
    each = functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return each.view(targets.shape).sum(dim=1)
