"""Ranks that take cases through the trainer's engine: one process imports, every case forks its ranks.

Reads a JSON object a line: {"recipe": {...}, "world_size": N, "batches": PATH, "output": DIRECTORY, "log": PATH}, where
``batches`` holds ``tokens`` [steps, sequences, sequence + 1] and optionally ``documents`` [steps, sequences, sequence]
(numbers of documents). Rank 0 writes ``gradients.safetensors`` (of the first step), ``weights.safetensors`` (after the
last) and ``result.json`` into ``output``; with ``from_scratch`` (a config) also ``initial.safetensors``, the weights
of that config as the layout initialises them. Answers with the exit codes.

The gradient is read from SGD's momentum after the first step: equal to it to the last bit, and part of every layout's
state. So cases run with ``optimizer: {name: sgd, momentum: ...}`` without weight decay or clipping.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # imports print there

import deepspeed  # noqa: F401 - imported for the children
import torch
import transformers  # noqa: F401
from safetensors.torch import load_file, save_file
from torch import distributed

import trainer.training.build  # noqa: F401
from trainer.config.deepspeed_json import resolve_deepspeed
from trainer.config.derive import derive
from trainer.config.run import Recipe
from trainer.core import environ
from trainer.core.environ import RankEnvironment
from trainer.data.batches import MicroBatch
from trainer.engine.base import TrainEngine
from trainer.engine.build import build_engine, join_group, leave_group
from trainer.launch.ports import free_port
from trainer.models.config import hugging_face_config
from trainer.parallel.topology import Topology
from trainer.tasks.pretrain import loss_spec

IGNORED = -100
TIMEOUT_SECONDS = 180

torch.set_num_threads(1)


def main() -> None:
    """Serve cases until standard input ends."""
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


def run(job: dict[str, Any]) -> list[int]:
    """Fork the ranks of one case, wait for them, kill all when one fails; return their exit codes."""
    port = free_port("127.0.0.1")
    pids: list[int] = []
    for rank in range(job["world_size"]):
        pid = os.fork()
        if pid == 0:
            _child(job, rank, port)
        pids.append(pid)
    codes: dict[int, int] = {}
    deadline = time.monotonic() + TIMEOUT_SECONDS
    failed_at: float | None = None
    while len(codes) < len(pids):
        for pid in [p for p in pids if p not in codes]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if failed_at is None and any(codes.values()):
            failed_at = time.monotonic()
        if time.monotonic() > deadline or (failed_at is not None and time.monotonic() > failed_at + 2):
            for pid in [p for p in pids if p not in codes]:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def _child(job: dict[str, Any], rank: int, port: int) -> None:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    world_size = job["world_size"]
    place = RankEnvironment(rank, world_size, rank, world_size, 0, "127.0.0.1", port, "environment")
    environ.export(place, os.environ)
    code = 1
    try:
        _case(job, place)
        code = 0
    except BaseException as error:  # noqa: BLE001 - told by exit code and log
        import traceback

        traceback.print_exc()
        Path(job["output"], f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    finally:
        sys.stderr.flush()
        os._exit(code)


def _case(job: dict[str, Any], place: RankEnvironment) -> None:
    recipe = Recipe.model_validate(job["recipe"])
    derived = derive(recipe, place.world_size)
    join_group(place)
    if job.get("damage"):
        _damage(job["damage"])
    output = Path(job["output"])
    if job.get("from_scratch"):
        model = recipe.model.model_copy(update={"path": None, "config": job["from_scratch"]})
        fresh = _engine(recipe.model_copy(update={"model": model}), place)
        _save(fresh, "weight", output / "initial.safetensors")
        fresh.close()
    engine = _engine(recipe, place)
    batches = load_file(job["batches"])
    parallel = recipe.parallel
    mesh = Topology(parallel.pipeline, derived.data_parallel, parallel.sequence, parallel.tensor)
    data = mesh.place(place.rank).data
    steps: list[list[float]] = []
    validation = engine.evaluate_batch(_rows(batches, 0, slice(0, recipe.batch.micro_size)))
    totals = torch.tensor(validation, dtype=torch.float64)
    distributed.all_reduce(totals)
    for step in range(len(batches["tokens"])):
        micro = recipe.batch.micro_size
        starts = [(index * derived.data_parallel + data) * micro for index in range(derived.accumulation)]
        mine = [_rows(batches, step, slice(start, start + micro)) for start in starts]
        result = engine.train_batch(mine, lambda preview: True, recipe.optimizer.learning_rate, False)
        steps.append([result.loss, result.grad_norm])
        if step == 0 and recipe.optimizer.name == "sgd":
            _save(engine, "momentum", output / "gradients.safetensors")
    _save(engine, "weight", output / "weights.safetensors")
    if place.rank == 0:
        found = {"steps": steps, "validation": float(totals[0] / totals[1]), "division": engine.division}
        (output / "result.json").write_text(json.dumps(found))
    engine.close()
    leave_group()


def _engine(recipe: Recipe, place: RankEnvironment) -> TrainEngine:
    resolved = resolve_deepspeed(recipe, derive(recipe, place.world_size))
    return build_engine(recipe, hugging_face_config(recipe.model), resolved, loss_spec(), place)


def _rows(batches: dict[str, torch.Tensor], step: int, rows: slice) -> MicroBatch:
    tokens = batches["tokens"][step, rows]
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
    if "documents" not in batches:
        return MicroBatch(inputs, targets)
    documents = batches["documents"][step, rows]
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    index = torch.arange(documents.shape[1]).expand_as(documents)
    positions = index - torch.where(starts, index, 0).cummax(dim=1).values
    targets[:, :-1][starts[:, 1:]] = IGNORED  # the last token of a document predicts nothing
    return MicroBatch(inputs, targets, positions, documents)


def _save(engine: TrainEngine, key: str, path: Path) -> None:
    """Gather one kind of state from all ranks, whole, and write it on rank 0."""
    mine = [(s.name, s.shape, s.start, s.tensor.clone()) for s in engine.iterate_state() if s.primary and s.key == key]
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, mine)
    if distributed.get_rank():
        return
    whole: dict[str, torch.Tensor] = {}
    for name, shape, start, values in (piece for part in parts for piece in part):
        tensor = whole.setdefault(name, torch.full((math.prod(shape),), math.nan))
        tensor[start : start + values.numel()] = values.float()
    shapes = {name: shape for part in parts for name, shape, _, _ in part}
    save_file({name: tensor.view(shapes[name]).contiguous() for name, tensor in whole.items()}, path)


def _damage(kind: str) -> None:
    """Break the trainer on purpose: a cell that stays green then would prove nothing."""
    from trainer.models import stages

    if kind == "swapped blocks":
        intact = stages.Stage.__init__

        def swapped(self: Any, network: Any, part: Any) -> None:
            intact(self, network, part)
            blocks = network.get_submodule(part.anatomy.blocks)
            if part.last - part.first > 1:
                one, other = blocks[part.first], blocks[part.first + 1]
                for (_, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
                    a.data, b.data = b.data, a.data

        stages.Stage.__init__ = swapped
    elif kind == "untied head":
        from trainer.engine.pipeline_module import StageModule

        StageModule.get_tied_weights_and_groups = lambda self: []
    elif kind == "dropped rotary":
        run_forward = stages.Stage._run

        def shifted(self: Any, arguments: dict[str, Any]) -> torch.Tensor:
            if self._route.received is not None:
                arguments = {**arguments, "position_ids": torch.zeros_like(arguments["input_ids"])}
            return run_forward(self, arguments)

        stages.Stage._run = shifted
    else:
        raise ValueError(kind)


if __name__ == "__main__":
    main()
