"""State that every rank holds in full: stage 0 in float32, frozen parameters, persistent buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from trainer.engine.base import StateSlice
from trainer.engine.optimizers import MasterState
from trainer.parallel.cut import cut_of, whole_shape_of

NamedTensor = tuple[str, torch.Tensor]
Owns = Callable[[str], bool]
"""Whether this rank's pipeline stage is the one that writes a tensor: tied copies lie on two of them."""


def owns_all(name: str) -> bool:
    """Every tensor is this stage's: there is no other."""
    return True


def owns_on_tensor_rank(parameters: Sequence[NamedTensor], tensor_rank: int, owns: Owns = owns_all) -> Owns:
    """Each tensor rank writes its parts of tensors; of what all of them hold, the first."""
    parts = {name for name, parameter in parameters if cut_of(parameter) is not None}
    return lambda name: owns(name) and (tensor_rank == 0 or name in parts)


def writers(sizes: Iterable[tuple[str, int]], world_size: int) -> dict[str, int]:
    """Assign each tensor to the rank that has least to write so far; the same answer on every rank."""
    load = [0] * world_size
    chosen: dict[str, int] = {}
    for name, size in sizes:
        rank = load.index(min(load))
        load[rank] += size
        chosen[name] = rank
    return chosen


def _is_writer(chosen: int, rank: int, tensor: torch.Tensor) -> bool:
    """Neighbours hold different experts: each of the group that the chosen rank is in writes its own."""
    ranks = getattr(tensor, "expert_ranks", 1)
    return chosen // ranks == rank // ranks


def persistent_buffers(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the buffers that belong to the model's state (rotary tables and the like are recomputed, so do not)."""
    for prefix, module in network.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer


def replicated_tensors(
    tensors: Sequence[NamedTensor], rank: int, world_size: int, owns: Owns = owns_all
) -> Iterator[StateSlice]:
    """Yield whole tensors as ``weight`` slices; of the ranks that hold them all, one writes each."""
    chosen = writers(((name, tensor.numel()) for name, tensor in tensors), world_size)
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        primary = _is_writer(chosen[name], rank, tensor) and owns(name)
        yield StateSlice(name, "weight", whole_shape_of(tensor), 0, flat, primary, cut_of(tensor))


class ReplicatedState:
    """Stage 0 in float32: the parameters are the masters and torch's optimizer holds the rest."""

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        masters: MasterState,
        rank: int,
        world_size: int,
        owns: Owns = owns_all,
    ) -> None:
        self._parameters = [(name, p) for name, p in parameters if p.requires_grad]
        self._masters = masters
        self._rank = rank
        self._owns = owns
        self._writers = writers(((name, p.numel()) for name, p in self._parameters), world_size)

    def masters(self) -> list[tuple[torch.Tensor, int]]:
        """Return the tensors torch's optimizer steps on, each with its parameter group."""
        groups = enumerate(self._masters.optimizer.param_groups)
        numbers = {id(parameter): number for number, group in groups for parameter in group["params"]}
        return [(parameter, numbers[id(parameter)]) for _, parameter in self._parameters]

    def slices(self) -> Iterator[StateSlice]:
        """Yield weights and optimizer state."""
        for name, parameter in self._parameters:
            primary = _is_writer(self._writers[name], self._rank, parameter) and self._owns(name)
            shape, cut = whole_shape_of(parameter), cut_of(parameter)
            for key, tensor in self._masters.of(parameter).items():
                yield StateSlice(name, key, shape, 0, tensor.view(-1), primary, cut)

    def refresh(self) -> None:
        """Nothing to do: masters and compute weights are one."""
