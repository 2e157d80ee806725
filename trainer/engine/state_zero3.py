"""State under ZeRO-3: every parameter is cut into equal parts, one a rank, the last one padded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import distributed, nn

from trainer.engine.base import StateSlice, Swapped
from trainer.engine.optimizers import MasterState
from trainer.engine.state_nvme import SwappedGroups, SwappedPiece


class Zero3State:
    """Slices of DeepSpeedZeroOptimizer_Stage3; with offload to NVMe one sub-group at a time is in memory."""

    def __init__(self, network: nn.Module, zero_optimizer: Any, masters: MasterState) -> None:
        self._network = network
        self._zero = zero_optimizer
        self._masters = masters
        self._medium = SwappedGroups(zero_optimizer)

    def masters(self) -> Iterator[tuple[torch.Tensor, int]]:
        """Yield this rank's float32 partitions, one a sub-group, each with its parameter group; they may be changed."""
        for number, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
            if self._medium.holds(number):
                self._medium.bring(number, changed=True)
            yield flat, self._zero.sub_group_to_group_id[number]
        self._medium.settle()

    def slices(self) -> Iterator[StateSlice]:
        """Yield this rank's part of every parameter; frozen ones in the compute dtype."""
        named: list[tuple[str, Any]] = list(self._network.named_parameters())  # Any: DeepSpeed adds ds_* to them
        # What lies on NVMe is read once, sub-group by sub-group.
        for name, parameter in sorted(named, key=lambda item: self._place(item[1])[0]):
            part = parameter.ds_tensor.ds_numel
            start = distributed.get_rank(parameter.ds_process_group) * part
            count = min(part, parameter.ds_numel - start)
            if count <= 0:  # fewer elements than ranks: nothing but padding here
                continue
            for key, held in self._held(parameter, count).items():
                yield StateSlice(name, key, tuple(parameter.ds_shape), start, held, primary=True)

    def _place(self, parameter: Any) -> tuple[int, int]:
        """Return sub-group and offset in it; frozen parameters are in none."""
        if not parameter.requires_grad:
            return -1, 0
        group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        return group, offset

    def _held(self, parameter: Any, count: int) -> Mapping[str, torch.Tensor | Swapped]:
        if not parameter.requires_grad:
            return {"weight": parameter.ds_tensor.detach().narrow(0, 0, count)}
        group, offset = self._place(parameter)
        flat = self._zero.fp32_partitioned_groups_flat[group]
        if not self._medium.holds(group):
            return {key: tensor.narrow(0, offset, count) for key, tensor in self._masters.of(flat).items()}

        def reader(key: str) -> Callable[[], torch.Tensor]:
            return lambda: self._masters.of(flat)[key].narrow(0, offset, count)

        return {key: SwappedPiece(self._medium, group, reader(key), count) for key in self._masters.of(flat)}

    def settle(self) -> None:
        """Let go of what was brought into memory to be read or filled."""
        self._medium.settle()

    def delete_files(self) -> None:
        """Delete what lies on NVMe."""
        self._medium.delete_files(list(self._network.parameters()))

    def refresh(self) -> None:
        """Copy the masters into this rank's compute weights; whole ones gathered earlier are let go."""
        self.settle()
        zero = self._zero
        gathered = [p for p in zero.persistent_parameters if p.ds_status == ZeroParamStatus.AVAILABLE]
        if gathered:
            gathered[0].partition(gathered)
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            if not self._medium.holds(group):  # those that do were copied when they were let go
                zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.invalidate_secondary_tensor()  # hpZ's second copy, made anew from the first at the next use
