"""Experts that are modules of their own, in a list: which of them run depends on the tokens of a rank.

transformers' own families hold all experts of a block in one module, which is always run; models that bring their own
code (``trust_remote_code``) often have such lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd import Function


def blocks_with_lists(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that hold a list of experts."""
    for module in network.modules():
        if any("expert" in name and isinstance(child, nn.ModuleList) for name, child in module.named_children()):
            yield module


class _Together(Function):
    @staticmethod
    def forward(ctx: Any, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(True)  # zeros for those that nothing used
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradients


def give_all_gradients(network: nn.Module) -> int:
    """Give every expert of a list a gradient, in the same order on every rank; return how many blocks have lists.

    DeepSpeed's ZeRO 1 and 2 sum gradients over ranks in the order they come in: an expert that got no token on one rank
    would be summed with another expert's gradient, or end the job.
    """
    found = 0
    for block in blocks_with_lists(network):
        _wrap(block)
        found += 1
    return found


def _wrap(block: nn.Module) -> None:
    own_forward = block.forward
    parameters = {name: p for name, p in block.named_parameters() if p.requires_grad}

    def forward(*args: Any, **kwargs: Any) -> Any:
        aliases = dict(zip(parameters, _Together.apply(*parameters.values()), strict=True))
        block.forward = own_forward
        try:
            return torch.func.functional_call(block, aliases, args, kwargs)
        finally:
            block.forward = forward

    block.forward = forward
