"""What the parts of a model cost in training, for the balance of pipeline stages."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from trainer.models.balance import Costs
from trainer.models.stages import Anatomy

_EXPERTS = re.compile(r"(^|\.)experts\.")


def parameter_costs(network: PreTrainedModel, anatomy: Anatomy) -> Costs:
    """Return parameters; a tied head is a second copy on the last stage and counts there too."""
    return _summed(network, anatomy, lambda name, shape: _numel(shape), front=True)


def flops_costs(network: PreTrainedModel, anatomy: Anatomy, sequence_length: int) -> Costs:
    """Return FLOPs per token of a forward and backward pass; looking up an embedding costs none.

    A weight of a matrix costs 6, the attention square 12 x heads x head size x length a block, as in
    ``models.flops``. Of a mixture's experts those count that a token goes through.
    """
    config = network.config.get_text_config()
    active = _active_share(config)

    def matrix(name: str, shape: tuple[int, ...]) -> float:
        if len(shape) < 2:
            return 0.0
        return 6.0 * _numel(shape) * (active if _EXPERTS.search(name) else 1.0)

    heads = getattr(config, "num_attention_heads", 0) or 0
    head_dim = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    square = 12.0 * heads * head_dim * sequence_length
    costs = _summed(network, anatomy, matrix, front=False)
    return Costs(tuple(block + square for block in costs.blocks), costs.front, costs.back)


def layer_costs(anatomy: Anatomy) -> Costs:
    """Count blocks; ends cost nothing."""
    return Costs((1.0,) * anatomy.num_blocks, 0.0, 0.0)


def _summed(
    network: nn.Module, anatomy: Anatomy, cost: Callable[[str, tuple[int, ...]], float], *, front: bool
) -> Costs:
    def of(prefix: str) -> float:
        module = network.get_submodule(prefix)
        return float(sum(cost(f"{prefix}.{name}", tuple(p.shape)) for name, p in module.named_parameters()))

    blocks = tuple(of(f"{anatomy.blocks}.{number}") for number in range(anatomy.num_blocks))
    return Costs(blocks, sum(map(of, anatomy.front)) if front else 0.0, sum(map(of, anatomy.back)))


def _active_share(config: PretrainedConfig) -> float:
    """Return the share of a mixture's experts that one token goes through."""
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    total = next((number for name in names if (number := _count(config, name))), 1)
    names = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
    chosen = next((number for name in names if (number := _count(config, name))), total)
    return min(1.0, chosen / total)


def _count(config: PretrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else 0


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
