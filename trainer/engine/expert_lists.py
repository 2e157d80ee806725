"""What DeepSpeed is told of experts that are modules of their own, in a list."""

from __future__ import annotations

from deepspeed.utils import set_z3_leaf_module
from torch import nn

from trainer.models.expert_lists import blocks_with_lists, give_all_gradients


def prepare_expert_lists(network: nn.Module, stage: int) -> None:
    """Keep ranks together whose tokens go to different experts.

    ZeRO-3 gathers all experts of a block when the block begins: otherwise each rank gathers those its tokens go to, in
    its own order, and waits for ranks that don't come. With other stages every expert gets a gradient.
    """
    if stage < 3:
        give_all_gradients(network)
        return
    for block in blocks_with_lists(network):
        set_z3_leaf_module(block, True)
