"""Assemble the engine: process group, model, optimizer, DeepSpeed. The only order of model surgery."""

from __future__ import annotations

import datetime
from typing import Any

import deepspeed
from torch import distributed
from transformers import PretrainedConfig, PreTrainedModel

from trainer.config.run import Recipe
from trainer.core.environ import RankEnvironment
from trainer.engine import collectives
from trainer.engine.build_pipeline import build_staged_engine
from trainer.engine.expert_groups import ExpertGroups
from trainer.engine.expert_lists import prepare_expert_lists
from trainer.engine.network import prepare_network, refuse_on_cpu, training_device
from trainer.engine.optimizers import build_optimizer
from trainer.engine.pipeline import StagedEngine
from trainer.engine.rendezvous import roll_call
from trainer.engine.state_nvme import prepare_nvme
from trainer.engine.tensor_groups import TensorGroups
from trainer.engine.upstream import lazy_muon, no_shared_memory_build
from trainer.engine.upstream.stage0_bfloat16 import stage0_bfloat16_engine
from trainer.engine.upstream.zero3_sharding import Zero3Sharding
from trainer.engine.zero import ZeroEngine
from trainer.models.build import build_model, cuts_of, skeleton
from trainer.models.loss import LossSpec
from trainer.models.shard_expert import shard_experts
from trainer.models.shard_sequence import ATTENTION, SequenceAttention
from trainer.models.shard_tensor import shard_tensor
from trainer.models.tiling import TiledLoss
from trainer.parallel.groups import axis_group
from trainer.parallel.topology import mesh_of


def join_group(
    environment: RankEnvironment, timeout_seconds: float = 600.0, rendezvous_timeout_seconds: float = 600.0
) -> None:
    """Join the process group of all ranks; ``environment`` has been exported to the process already.

    Raises RendezvousError, naming who is missing, where the ranks don't find each other in time.
    """
    store = roll_call(environment, rendezvous_timeout_seconds)
    training_device(environment.local_rank)  # before the first collective: NCCL takes the device that is current then
    collectives.install()
    no_shared_memory_build.disable()
    lazy_muon.install()
    deepspeed.init_distributed(
        auto_mpi_discovery=False,
        verbose=False,
        timeout=datetime.timedelta(seconds=timeout_seconds),
        rank=environment.rank,
        world_size=environment.world_size,
    )
    del store  # its server had to live until torch's own store shared it


def leave_group() -> None:
    """Leave the process group; without this a rank may abort at interpreter exit."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def build_engine(
    recipe: Recipe,
    config: PretrainedConfig,
    deepspeed_json: dict[str, Any],
    loss: LossSpec,
    environment: RankEnvironment,
    *,
    from_scratch: bool = False,
) -> ZeroEngine | StagedEngine:
    """Return the engine of this rank. ``from_scratch`` skips pretrained weights: a checkpoint will replace them.

    No rank then holds more of the model than it keeps, and a module.
    """
    model = recipe.model.model_copy(update={"path": None}) if from_scratch else recipe.model
    if recipe.parallel.pipeline > 1:
        return build_staged_engine(recipe, model, config, deepspeed_json, loss, environment, from_scratch=from_scratch)
    stage = deepspeed_json["zero_optimization"]["stage"]

    def largest_parameter() -> int:
        return max(parameter.numel() for parameter in skeleton(model, config).parameters())

    prepare_nvme(deepspeed_json, largest_parameter, environment.world_size)
    device = training_device(environment.local_rank)
    refuse_on_cpu(deepspeed_json, device)
    mesh = mesh_of(recipe.parallel, environment.world_size)
    sequence = None
    if recipe.parallel.sequence > 1:
        sequence = SequenceAttention(axis_group(mesh, "sequence"), config)
        model = model.model_copy(update={"attention": ATTENTION})
    group = axis_group(mesh, "tensor") if recipe.parallel.tensor > 1 else None
    experts = ExpertGroups(recipe.parallel.expert) if recipe.parallel.expert > 1 else None

    def divide(whole: PreTrainedModel) -> PreTrainedModel:
        if group is not None:
            shard_tensor(whole, group)
        if experts is not None:
            shard_experts(whole, experts.ranks, experts.name)
        return whole

    divided = group is not None or experts is not None
    network = build_model(
        model,
        config,
        seed=recipe.run.seed,
        device=device,
        rank=environment.rank,
        sharding=Zero3Sharding(deepspeed_json) if stage == 3 else None,
        cuts=cuts_of(divide(skeleton(model, config))) if from_scratch and divided else None,
    )
    divide(network)
    tensor = TensorGroups(mesh, group) if group is not None else None
    if experts is not None:
        network.add_module("expert_groups", experts)
    prepare_expert_lists(network, stage)
    prepare_network(network, recipe)
    if recipe.memory.tiled_loss:
        network.forward = TiledLoss(network, loss, recipe.memory.tiled_loss)
    optimizer = build_optimizer(recipe.optimizer, network.named_parameters(), device)
    if stage == 0 and deepspeed_json.get("bf16", {}).get("enabled"):
        engine = stage0_bfloat16_engine(network, optimizer, deepspeed_json, tensor)
    else:
        engine = deepspeed.initialize(model=network, optimizer=optimizer, config=deepspeed_json, mpu=tensor)[0]
    return ZeroEngine(engine, loss, recipe.optimizer, stage, len(recipe.data.train), mesh, sequence, tensor, experts)
