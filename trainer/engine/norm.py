"""The norm of a model's gradient where DeepSpeed does not give it: stage 0 in float32."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import distributed, nn

from trainer.parallel.cut import cut_of


def gradient_norm(
    parameters: Iterable[nn.Parameter], tensor_group: distributed.ProcessGroup | None, device: torch.device
) -> torch.Tensor:
    """Return the L2 norm over all gradients, a float32 scalar; parts of other tensor ranks are added.

    Collective over ``tensor_group``.
    """
    trained = [p for p in parameters if p.grad is not None]
    shared = [p.grad for p in trained if cut_of(p) is None]
    norm = nn.utils.get_total_norm(shared).to(device)  # type: ignore[arg-type]
    if tensor_group is None:
        return norm
    parts = nn.utils.get_total_norm([p.grad for p in trained if cut_of(p) is not None])  # type: ignore[arg-type]
    square = parts.double().square().to(device)
    distributed.all_reduce(square, group=tensor_group)
    return (square + norm.double().square()).sqrt().float()
