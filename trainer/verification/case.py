"""Take a case through the engine as one of its ranks, and write what came out for a comparison."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from trainer.config.deepspeed_json import resolve_deepspeed
from trainer.config.derive import derive
from trainer.config.run import Recipe
from trainer.core.environ import RankEnvironment
from trainer.core.targets import IGNORE_INDEX
from trainer.data.batches import MicroBatch
from trainer.engine.base import Requests, TrainEngine
from trainer.engine.build import build_engine
from trainer.models.config import hugging_face_config
from trainer.optim.schedules import multiplier
from trainer.parallel.cut import Cut
from trainer.parallel.topology import mesh_of
from trainer.tasks.pretrain import loss_spec


def run_case(case: dict[str, Any], place: RankEnvironment) -> None:
    """Train a few steps and write gradients, weights and losses.

    ``case``: {"recipe": {...}, "batches": PATH, "output": DIRECTORY}, with ``batches`` as in ``reference.py``. With
    "from_scratch" (fields of a config) the weights of that config as this layout initialises them are written too, as
    ``initial.safetensors``.

    The gradient is read from SGD's momentum after the first step: equal to it to the last bit, and part of the state
    of every layout. So it is told only by recipes with ``optimizer: {name: sgd, momentum: ...}`` without clipping.
    """
    recipe = Recipe.model_validate(case["recipe"])
    output = Path(case["output"])
    if case.get("from_scratch"):
        model = recipe.model.model_copy(update={"path": None, "config": case["from_scratch"]})
        fresh = _engine(recipe.model_copy(update={"model": model}), place)
        save_state(fresh, "weight", output / "initial.safetensors")
        fresh.close()
    engine = _engine(recipe, place)
    batches = load_file(case["batches"])
    derived, data = derive(recipe, place.world_size), mesh_of(recipe.parallel, place.world_size).place(place.rank).data
    micro = recipe.batch.micro_size
    engine.evaluate([rows_of(batches, 0, slice(0, micro))])  # evaluation between steps changes nothing
    steps: list[list[float]] = []
    for step in range(len(batches["tokens"])):
        starts = [(index * derived.data_parallel + data) * micro for index in range(derived.accumulation)]
        mine = [rows_of(batches, step, slice(start, start + micro)) for start in starts]
        rate = recipe.optimizer.learning_rate * multiplier(recipe.schedule, step + 1, derived.total_steps)
        result = engine.train_batch(mine, lambda preview: True, rate, Requests())
        steps.append([result.loss, result.grad_norm])
        if step == 0 and recipe.optimizer.name == "sgd" and recipe.optimizer.momentum:
            save_state(engine, "momentum", output / "gradients.safetensors")
    save_state(engine, "weight", output / "weights.safetensors")
    if place.rank == 0:
        (output / "result.json").write_text(json.dumps({"steps": steps, "division": engine.division}))
    engine.close()


def second_document_losses(case: dict[str, Any], place: RankEnvironment) -> None:
    """Write the loss of the second document of each row of ``batches``, as ``documents.json`` on rank 0: [one a step].

    The steps hold the same second documents behind different first ones.
    """
    recipe = Recipe.model_validate(case["recipe"])
    engine = _engine(recipe, place)
    batches = load_file(case["batches"])
    losses: list[float] = []
    for step in range(len(batches["tokens"])):
        row = rows_of(batches, step, slice(0, recipe.batch.micro_size))
        assert row.document_ids is not None
        second = replace(row, targets=row.targets.masked_fill(row.document_ids == 0, IGNORE_INDEX))
        total = torch.tensor(engine.evaluate([second]), dtype=torch.float64)
        distributed.all_reduce(total)
        losses.append(float(total[0] / total[1]))
    if place.rank == 0:
        Path(case["output"], "documents.json").write_text(json.dumps(losses))
    engine.close()


def rows_of(batches: dict[str, torch.Tensor], step: int, rows: slice) -> MicroBatch:
    """Return some sequences of a step as the loader would."""
    tokens = batches["tokens"][step, rows]
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
    if "documents" not in batches:
        return MicroBatch(inputs, targets)
    documents = batches["documents"][step, rows]
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    index = torch.arange(documents.shape[1]).expand_as(documents)
    positions = index - torch.where(starts, index, 0).cummax(dim=1).values
    targets[:, :-1][starts[:, 1:]] = IGNORE_INDEX  # the last token of a document predicts nothing
    return MicroBatch(inputs, targets, positions, documents)


def save_state(engine: TrainEngine, key: str, path: Path) -> None:
    """Gather one kind of state from all ranks, whole, and write it on rank 0."""
    found = [s for s in engine.iterate_state() if s.primary and s.key == key]
    mine = [(s.name, s.cut, s.shape, s.start, s.tensor.clone().cpu()) for s in found]
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, mine)
    if distributed.get_rank():
        return
    held: dict[tuple[str, Cut | None], torch.Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, cut, shape, start, values in (piece for part in parts for piece in part):
        shapes[name] = shape
        tensor = held.setdefault((name, cut), torch.full(cut.part_shape(shape) if cut else shape, math.nan))
        tensor.view(-1)[start : start + values.numel()] = values.float()
    whole = {name: torch.full(shape, math.nan) for name, shape in shapes.items()}
    for (name, cut), tensor in held.items():
        if cut is None:
            whole[name] = tensor
        else:
            cut.put(tensor, whole[name])
    save_file(whole, path)


def _engine(recipe: Recipe, place: RankEnvironment) -> TrainEngine:
    resolved = resolve_deepspeed(recipe, derive(recipe, place.world_size))
    return build_engine(recipe, hugging_face_config(recipe.model), resolved, loss_spec(), place)
