"""State under DeepSpeed's flat partitions: ZeRO-1, ZeRO-2 and BF16_Optimizer (also unpartitioned, at stage 0).

Each parameter's master slice is ``parameter._hp_mapping.hp_fragment``; ``lp_fragment_address`` tells where it lies in
the flattened parameter. The optimizer's moments are cut at the same place of the flat partition they belong to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from trainer.engine.base import StateSlice
from trainer.engine.optimizers import MasterState
from trainer.engine.state_replicated import Owns, owns_all, writers
from trainer.parallel.cut import cut_of, whole_shape_of


class FlatPartitionState:
    """Slices of DeepSpeedZeroOptimizer (ZeRO-1/2) or BF16_Optimizer."""

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        zero_optimizer: Any,
        masters: MasterState,
        replicated: bool,
        rank: int,
        world_size: int,
        owns: Owns = owns_all,
    ) -> None:
        # Any: DeepSpeed hangs _hp_mapping on them.
        self._parameters: list[tuple[str, Any]] = [(n, p) for n, p in parameters if p.requires_grad]
        self._zero = zero_optimizer
        self._masters = masters
        self._rank = rank
        self._owns = owns
        # Unpartitioned (stage 0): every rank has all of it, so one of them is chosen to write.
        self._writers = writers(((name, p.numel()) for name, p in self._parameters), world_size) if replicated else None

    def masters(self) -> list[tuple[torch.Tensor, int]]:
        """Return this rank's float32 flat partitions, one a parameter group."""
        return [(flat, number) for number, flat in enumerate(self._flats())]

    def _flats(self) -> list[torch.Tensor]:
        flats = getattr(self._zero, "single_partition_of_fp32_groups", None)
        return flats if flats is not None else self._zero.fp32_groups_flat_partition

    def slices(self) -> Iterator[StateSlice]:
        """Yield the master weights and optimizer state of this rank's partition."""
        flats = self._flats()
        for name, parameter in self._parameters:
            mapping = parameter._hp_mapping
            if mapping is None:  # lies wholly in other ranks' partitions
                continue
            primary = self._owns(name) and (self._writers is None or self._writers[name] == self._rank)
            shape, cut = whole_shape_of(parameter), cut_of(parameter)
            start = mapping.lp_fragment_address.start
            address = mapping.hp_fragment_address
            flat = flats[mapping.param_group_index]
            for key, tensor in self._masters.of(flat).items():
                yield StateSlice(name, key, shape, start, tensor.narrow(0, address.start, address.numel), primary, cut)

    def refresh(self) -> None:
        """Copy the masters into the compute weights of every rank."""
        self._zero.update_lp_params()
