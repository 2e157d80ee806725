"""Give ZeRO stage 0 in bfloat16 float32 masters and float32 gradient accumulation (DeepSpeed 0.19.8).

Upstream refuses ``grad_accum_dtype: fp32`` at stage 0 ("unsupported mix") and without it keeps no master weights: the
second step's loss is 6.782 instead of 6.745. DeepSpeed's own BF16_Optimizer does what is wanted when its partition
group is a single rank: nothing is partitioned, while the engine still averages gradients over the data-parallel group.
Test: tests/distributed/test_engine.py (bfloat16, stage 0), test_upstream.py.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import BFLOAT16, DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch import distributed, nn


class _Unpartitioned(DeepSpeedEngine):
    """An unpartitioned BF16_Optimizer at stage 0."""

    def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> Any:
        assert self.zero_optimization_stage() == ZeroStageEnum.disabled
        return BFLOAT16

    def _configure_bf16_optimizer(self, optimizer: torch.optim.Optimizer | None) -> Any:
        # every rank makes every group: new_group is collective
        groups = [distributed.new_group([rank]) for rank in range(distributed.get_world_size())]
        data_parallel = self.seq_data_parallel_group
        self.seq_data_parallel_group = groups[distributed.get_rank()]
        try:
            return super()._configure_bf16_optimizer(optimizer)
        finally:
            self.seq_data_parallel_group = data_parallel


class _Engine(_Unpartitioned):
    """DeepSpeed's engine with it."""


class _PipelineEngine(_Unpartitioned, PipelineEngine):
    """DeepSpeed's pipeline engine with it."""


def stage0_bfloat16_engine(
    network: nn.Module, optimizer: torch.optim.Optimizer, deepspeed_json: dict[str, Any], mesh: Any = None
) -> DeepSpeedEngine:
    """Return what ``deepspeed.initialize`` would, with float32 masters; of a PipelineModule a pipeline engine.

    ``mesh``: the groups of tensor ranks, if there are any; a PipelineModule has its own.
    """
    staged = isinstance(network, PipelineModule)
    if isinstance(network, PipelineModule):
        mesh = network.mpu()
    return (_PipelineEngine if staged else _Engine)(
        args=None,
        model=network,
        optimizer=optimizer,
        mpu=mesh,
        config=deepspeed_json,
        config_class=deepspeed.DeepSpeedConfig(deepspeed_json, mesh),
        dist_init_required=False,
    )
