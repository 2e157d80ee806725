"""State that every rank holds in full: stage 0 in float32, frozen parameters, persistent buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from trainer.engine.base import StateSlice
from trainer.engine.optimizers import MasterState


def writers(sizes: Iterable[tuple[str, int]], world_size: int) -> dict[str, int]:
    """Assign each tensor to the rank that has least to write so far; the same answer on every rank."""
    load = [0] * world_size
    chosen: dict[str, int] = {}
    for name, size in sizes:
        rank = load.index(min(load))
        load[rank] += size
        chosen[name] = rank
    return chosen


def persistent_buffers(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the buffers that belong to the model's state (rotary tables and the like are recomputed, so do not)."""
    for prefix, module in network.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer


def replicated_tensors(tensors: list[tuple[str, torch.Tensor]], rank: int, world_size: int) -> Iterator[StateSlice]:
    """Yield whole tensors as ``weight`` slices; one rank of all writes each."""
    chosen = writers(((name, tensor.numel()) for name, tensor in tensors), world_size)
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        yield StateSlice(name, "weight", tuple(tensor.shape), 0, flat, primary=chosen[name] == rank)


class ReplicatedState:
    """Stage 0 in float32: the parameters are the masters and torch's optimizer holds the rest."""

    def __init__(self, network: nn.Module, masters: MasterState, rank: int, world_size: int) -> None:
        self._parameters = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        self._masters = masters
        self._rank = rank
        self._writers = writers(((name, p.numel()) for name, p in self._parameters), world_size)

    def flat_masters(self) -> list[torch.Tensor]:
        """Return the tensors torch's optimizer steps on."""
        return [parameter for _, parameter in self._parameters]

    def slices(self) -> Iterator[StateSlice]:
        """Yield weights and optimizer state."""
        for name, parameter in self._parameters:
            primary = self._writers[name] == self._rank
            shape = tuple(parameter.shape)
            for key, tensor in self._masters.of(parameter).items():
                yield StateSlice(name, key, shape, 0, tensor.view(-1), primary)

    def refresh(self) -> None:
        """Nothing to do: masters and compute weights are one."""
