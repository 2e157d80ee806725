"""What tensor-parallel ranks exchange, with gradients.

DeepSpeed's functions of AutoTP do the same, but lose the sum of a gradient that is not contiguous (0.19.8).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed
from torch.autograd import Function

Group = distributed.ProcessGroup


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _summed(gradients[0], ctx.group), None


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        return _summed(tensor, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return _gathered(tensor, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _own_part(gradients[0], ctx.group), None


class _Split(Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return _own_part(tensor, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _gathered(gradients[0], ctx.group), None


def enter(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Return ``tensor``, the same on all ranks, for work that they share; its gradients are summed."""
    return _Enter.apply(tensor, group)


def sum_parts(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Return the sum over the ranks; what follows is done by all of them alike."""
    return _Sum.apply(tensor, group)


def gather(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Return the ranks' tensors joined along the last dim; what follows is done by all of them alike."""
    return _Gather.apply(tensor, group)


def split(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Return this rank's part along the last dim of a tensor that is the same on all ranks."""
    return _Split.apply(tensor, group)


def _summed(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, group=group)
    return total


def _gathered(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    mine = tensor.contiguous()
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    distributed.all_gather(parts, mine, group=group)
    return torch.cat(parts, dim=-1)


def _own_part(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    return tensor.chunk(group.size(), dim=-1)[group.rank()].contiguous()


class _SendRows(Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sent: list[int], received: list[int], group: Group) -> torch.Tensor:
        ctx.counts, ctx.group = (received, sent), group
        return _rows_sent(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        sent, received = ctx.counts
        return _rows_sent(gradients[0], sent, received, ctx.group), None, None, None


def send_rows(rows: torch.Tensor, sent: list[int], received: list[int], group: Group) -> torch.Tensor:
    """Send the first ``sent[0]`` rows to rank 0, the next to rank 1, ...; return what came, rank by rank."""
    return _SendRows.apply(rows, sent, received, group)


def _rows_sent(rows: torch.Tensor, sent: list[int], received: list[int], group: Group) -> torch.Tensor:
    arrived = rows.new_empty((sum(received), *rows.shape[1:]))
    distributed.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived
