"""Assemble one rank of a pipeline: cut the model, build or load this rank's stage, hand it to DeepSpeed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import deepspeed
import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from trainer.config.model import ModelConfig
from trainer.config.run import Recipe
from trainer.core.environ import RankEnvironment
from trainer.core.errors import Problem, RecipeError
from trainer.core.units import format_count
from trainer.engine.expert_lists import prepare_expert_lists
from trainer.engine.network import prepare_network, training_device
from trainer.engine.optimizers import build_optimizer
from trainer.engine.pipeline import StagedEngine, WholeModel
from trainer.engine.pipeline_module import MicroBatches, StageModule
from trainer.engine.state_replicated import persistent_buffers
from trainer.engine.upstream.stage0_bfloat16 import stage0_bfloat16_engine
from trainer.models.balance import Costs, balance
from trainer.models.build import build_model, cuts_of, freeze, skeleton
from trainer.models.costs import flops_costs, layer_costs, parameter_costs
from trainer.models.loss import LossSpec
from trainer.models.measure import time_costs
from trainer.models.shard_tensor import shard_tensor
from trainer.models.stages import Anatomy, Stage, StagePart, anatomy_of
from trainer.models.tiling import tile_last_stage
from trainer.parallel.groups import axis_group
from trainer.parallel.topology import mesh_of


def build_staged_engine(
    recipe: Recipe,
    model: ModelConfig,
    config: PretrainedConfig,
    deepspeed_json: dict[str, Any],
    loss: LossSpec,
    environment: RankEnvironment,
    *,
    from_scratch: bool,
) -> StagedEngine:
    """Return the engine of this rank's stage; see build_engine for ``from_scratch``.

    Raises RecipeError, on all ranks alike, if the model can't be cut.
    """
    topology = mesh_of(recipe.parallel, environment.world_size)
    place = topology.place(environment.rank)
    device = training_device(environment.local_rank)
    whole = skeleton(model, config)
    freeze(whole.named_parameters(), model.freeze)
    anatomy = anatomy_of(whole)
    bounds = split(whole, anatomy, recipe, config, device)
    _refuse_frozen_stage(whole, anatomy, bounds)
    part = StagePart(anatomy, bounds[place.stage], bounds[place.stage + 1])
    group = axis_group(topology, "tensor") if topology.tensor > 1 else None
    cuts = None
    if group is not None and from_scratch:
        cuts = cuts_of(shard_tensor(skeleton(model, config), group))
    network = build_model(model, config, seed=recipe.run.seed, device=device, part=part, cuts=cuts)
    if group is not None:
        shard_tensor(network, group)
    prepare_expert_lists(network, deepspeed_json["zero_optimization"]["stage"])
    prepare_network(network, recipe, whole)
    if recipe.memory.tiled_loss and part.is_last:
        loss = tile_last_stage(network, loss, recipe.memory.tiled_loss)
    batches = MicroBatches()
    tied = [parameter for _, parameter in part.tied_copies(network)]
    module = StageModule(Stage(network, part), topology, batches, tied, num_tied=len(anatomy.tied))
    optimizer = build_optimizer(recipe.optimizer, part.parameters(network), device, whole.named_parameters())
    module.adopt(parameter for group in optimizer.param_groups for parameter in group["params"])
    if deepspeed_json["zero_optimization"]["stage"] == 0 and deepspeed_json.get("bf16", {}).get("enabled"):
        engine = stage0_bfloat16_engine(module, optimizer, deepspeed_json)
    else:
        engine = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_json)[0]
    facts = _whole_model(whole, anatomy, bounds)
    return StagedEngine(
        cast("PipelineEngine", engine), network, part, facts, topology, batches, loss, recipe.optimizer,
        num_sources=len(recipe.data.train),
    )  # fmt: skip


def split(
    whole: PreTrainedModel, anatomy: Anatomy, recipe: Recipe, config: PretrainedConfig, device: torch.device
) -> tuple[int, ...]:
    """Return the boundaries of the stages. Raises RecipeError for more stages than blocks."""
    num_stages = recipe.parallel.pipeline
    if num_stages > anatomy.num_blocks:
        rule = f"the model has {anatomy.num_blocks} blocks, and every stage needs one"
        raise RecipeError(Problem("parallel.pipeline", num_stages, rule, f"use at most {anatomy.num_blocks}"))
    return balance(_costs(whole, anatomy, recipe, config, device), num_stages)


def _costs(
    whole: PreTrainedModel, anatomy: Anatomy, recipe: Recipe, config: PretrainedConfig, device: torch.device
) -> Costs:
    if recipe.parallel.balance == "time":
        shape = recipe.batch.micro_size, recipe.data.sequence_length
        return time_costs(recipe.model, config, whole, anatomy, device, shape)
    if recipe.parallel.balance == "layers":
        return layer_costs(anatomy)
    if recipe.parallel.balance == "parameters":
        return parameter_costs(whole, anatomy)
    return flops_costs(whole, anatomy, recipe.data.sequence_length)


def _refuse_frozen_stage(whole: PreTrainedModel, anatomy: Anatomy, bounds: tuple[int, ...]) -> None:
    """DeepSpeed's optimizer needs something to step on every rank."""
    for number, (first, last) in enumerate(pairwise(bounds)):
        if not any(p.requires_grad for p in _stage_parameters(whole, StagePart(anatomy, first, last))):
            rule = f"leaves nothing to train in pipeline stage {number} (blocks {first} to {last - 1})"
            raise RecipeError(Problem("model.freeze", None, rule, "freeze fewer, or use fewer stages"))


def _stage_parameters(whole: PreTrainedModel, part: StagePart) -> list[nn.Parameter]:
    foreign = tuple(f"{name}." for name in part.foreign_modules())
    return [p for name, p in whole.named_parameters(remove_duplicate=False) if not name.startswith(foreign)]


def _whole_model(whole: PreTrainedModel, anatomy: Anatomy, bounds: tuple[int, ...]) -> WholeModel:
    named = [*whole.named_parameters(), *persistent_buffers(whole)]
    shapes = {name: tuple(tensor.shape) for name, tensor in named}
    division: list[str] = []
    for number, (first, last) in enumerate(pairwise(bounds)):
        part = StagePart(anatomy, first, last)
        held = sum({id(p): p.numel() for p in _stage_parameters(whole, part)}.values())
        ends = ("embeddings, " if part.is_first else "", ", head" if part.is_last else "")
        blocks = f"block {first}" if last == first + 1 else f"blocks {first}-{last - 1}"
        division.append(f"stage {number}: {ends[0]}{blocks}{ends[1]}, {format_count(held)} parameters")
    return WholeModel(shapes, sum(p.numel() for p in whole.parameters()), division)
