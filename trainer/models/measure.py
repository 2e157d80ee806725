"""Measure what blocks, embeddings and head cost on this device, for the balance of pipeline stages."""

from __future__ import annotations

import statistics
import time

import torch
from torch import distributed, nn
from transformers import PretrainedConfig, PreTrainedModel

from trainer.config.model import ModelConfig
from trainer.models.balance import Costs
from trainer.models.build import skeleton
from trainer.models.costs import flops_costs
from trainer.models.loss import cross_entropy_by_row
from trainer.models.stages import Anatomy, Stage, StagePart, prune

_MEASURED = 3
"""Passes timed; one before them warms up."""


def time_costs(
    model: ModelConfig, config: PretrainedConfig, whole: PreTrainedModel, anatomy: Anatomy, device: torch.device,
    shape: tuple[int, int],
) -> Costs:  # fmt: skip
    """Return seconds of a forward and backward pass of ``shape`` = (micro size, length), the same on all ranks.

    Stages of one and two blocks and the last one are timed with random weights, by all ranks at the same time, as they
    will run, and averaged. The other blocks are taken to differ from the first as their FLOPs do. Collective.
    """
    num_blocks = anatomy.num_blocks
    if num_blocks == 1:
        return Costs((1.0,), 0.0, 0.0)
    cuts = [(0, 1), (0, min(2, num_blocks)), (num_blocks - 1, num_blocks)]
    parts = [StagePart(anatomy, first, last) for first, last in cuts]
    seconds = torch.tensor([_seconds(model, config, part, device, shape) for part in parts], dtype=torch.float64)
    if distributed.is_initialized():
        seconds = seconds.to(device)
        distributed.all_reduce(seconds)
        seconds /= distributed.get_world_size()
    one, two, last = seconds.tolist()
    flops = flops_costs(whole, anatomy, shape[1]).blocks
    block = max(two - one, 1e-9)  # the second one
    unit = block / flops[1]
    return Costs(
        tuple(unit * cost for cost in flops), max(0.0, one - unit * flops[0]), max(0.0, last - unit * flops[-1])
    )


def _seconds(
    model: ModelConfig, config: PretrainedConfig, part: StagePart, device: torch.device, shape: tuple[int, int]
) -> float:
    network = skeleton(model, config)
    prune(network, part)
    _fill_at_random(network, getattr(torch, model.dtype), device)
    stage = Stage(network, part).train()
    text = config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(text.vocab_size, shape, generator=generator).to(device)
    received = None
    if not part.is_first:
        states = torch.randn((*shape, text.hidden_size), dtype=getattr(torch, model.dtype), device=device)
        received = states.requires_grad_()
    taken: list[float] = []
    for _ in range(1 + _MEASURED):
        started = time.perf_counter()
        output = stage({"input_ids": ids}, received)
        if part.is_last:
            cross_entropy_by_row(output, ids).sum().backward()
        else:
            output.float().square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def _fill_at_random(network: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                module._parameters[name] = nn.Parameter(torch.randn(parameter.shape, device=device, dtype=dtype) * 0.02)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.to(device)
