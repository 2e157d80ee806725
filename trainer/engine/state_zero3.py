"""State under ZeRO-3: every parameter is cut into equal parts, one a rank, the last one padded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import distributed, nn

from trainer.engine.base import StateSlice
from trainer.engine.optimizers import MasterState


class Zero3State:
    """Slices of DeepSpeedZeroOptimizer_Stage3."""

    def __init__(self, network: nn.Module, zero_optimizer: Any, masters: MasterState) -> None:
        self._network = network
        self._zero = zero_optimizer
        self._masters = masters

    def masters(self) -> list[tuple[torch.Tensor, int]]:
        """Return this rank's float32 partitions, one a sub-group, each with its parameter group."""
        flats = enumerate(self._zero.fp32_partitioned_groups_flat)
        return [(flat, self._zero.sub_group_to_group_id[number]) for number, flat in flats]

    def slices(self) -> Iterator[StateSlice]:
        """Yield this rank's part of every parameter; frozen ones in the compute dtype."""
        named: list[tuple[str, Any]] = list(self._network.named_parameters())  # Any: DeepSpeed adds ds_* to them
        for name, parameter in named:
            part = parameter.ds_tensor.ds_numel
            start = distributed.get_rank(parameter.ds_process_group) * part
            count = min(part, parameter.ds_numel - start)
            if count <= 0:  # fewer elements than ranks: nothing but padding here
                continue
            for key, tensor in self._tensors(parameter).items():
                yield StateSlice(name, key, tuple(parameter.ds_shape), start, tensor.narrow(0, 0, count), primary=True)

    def _tensors(self, parameter: Any) -> dict[str, torch.Tensor]:
        if not parameter.requires_grad:
            return {"weight": parameter.ds_tensor.detach()}
        zero = self._zero
        group, offset, count = zero.grad_position[zero.get_param_id(parameter)]
        flat = zero.fp32_partitioned_groups_flat[group]
        return {key: tensor.narrow(0, offset, count) for key, tensor in self._masters.of(flat).items()}

    def refresh(self) -> None:
        """Copy the masters into this rank's compute weights; whole ones gathered earlier are let go."""
        zero = self._zero
        gathered = [p for p in zero.persistent_parameters if p.ds_status == ZeroParamStatus.AVAILABLE]
        if gathered:
            gathered[0].partition(gathered)
        for group, flat in enumerate(zero.fp32_partitioned_groups_flat):
            zero.fp16_partitioned_groups_flat[group].data.copy_(flat.data)
            zero._unflatten_partitioned_parameters(group)
        zero.invalidate_secondary_tensor()  # hpZ's second copy, made anew from the first at the next use
