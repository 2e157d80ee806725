"""Spread the experts of a Hugging Face mixture over data-parallel ranks; tokens travel to their experts and back.

The experts are transformers' own modules (three-dimensional weights, [experts, ...]), cut along the first dim in place,
so names stay as they are. DeepSpeed's AutoEP replaces the modules and renames what they hold (0.19.8).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import distributed, nn
from transformers import PreTrainedModel

from trainer.core.errors import Problem, RecipeError
from trainer.parallel.cut import Cut, cut_of, whole_shape_of
from trainer.parallel.exchange import send_rows

Group = distributed.ProcessGroup


def shard_experts(network: PreTrainedModel, group: Group, group_name: str) -> int:
    """Keep this rank's experts of every block; return how many blocks have some.

    ``group_name`` is what DeepSpeed calls the ranks. Raises RecipeError, on all ranks alike, if there are no experts,
    or not a multiple of the ranks.
    """
    blocks = [module for name, module in network.named_modules() if _are_experts(name, module)]
    if not blocks:
        kind = network.config.get_text_config().model_type
        rule = f"{kind} has no experts whose weights lie in one tensor"
        raise RecipeError(Problem("parallel.expert", group.size(), rule, "set it to 1"))
    for module in blocks:
        _share(module, group, group_name)
    return len(blocks)


def _are_experts(name: str, module: nn.Module) -> bool:
    weights = list(module.parameters(recurse=False))
    count = getattr(module, "num_experts", None)
    if name.rpartition(".")[2] != "experts" or not weights or count is None:
        return False
    return all(whole_shape_of(weight)[0] == count for weight in weights)  # built in parts, or whole


def _share(module: Any, group: Group, group_name: str) -> None:
    count, ranks = module.num_experts, group.size()
    if count % ranks:
        divisors = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        rule = f"does not divide the model's {count} experts"
        raise RecipeError(Problem("parallel.expert", ranks, rule, f"use one of {divisors}"))
    cut = Cut(0, group.rank(), ranks)
    for parameter in module.parameters(recurse=False):
        if cut_of(parameter) is None:  # not built so
            parameter.data = cut.take(parameter.data)
            parameter.cut = cut
        parameter.expert_ranks = ranks
        parameter.allreduce, parameter.group_name = False, group_name  # what DeepSpeed knows experts by
    module.num_experts = count // ranks
    own_forward = module.forward

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        # hidden_states [tokens, hidden]; top_k_index, top_k_weights [tokens, k]
        width, local = top_k_index.shape[1], module.num_experts
        expert, order = top_k_index.reshape(-1).sort(stable=True)
        sent = torch.bincount(expert // local, minlength=ranks)
        received = torch.empty_like(sent)
        distributed.all_to_all_single(received, sent, group=group)
        counts = sent.tolist(), received.tolist()
        rows = send_rows(hidden_states.index_select(0, order // width), *counts, group)
        own = send_rows((expert % local).unsqueeze(1), *counts, group)
        output = own_forward(rows, own, rows.new_ones(own.shape)) if len(rows) else _starved(module, rows)
        returned = send_rows(output, counts[1], counts[0], group)
        weighted = returned * top_k_weights.reshape(-1)[order].unsqueeze(1).to(returned.dtype)
        return torch.zeros_like(hidden_states).index_add(0, order // width, weighted)

    module.forward = forward


def _starved(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Return ``rows``, none at all, so that the backward pass still reaches what the other ranks wait in."""
    return rows + cast("torch.Tensor", sum(p.flatten()[:0].sum() for p in module.parameters()))
