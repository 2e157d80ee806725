"""One rank that takes a list of cases through the engine; many cases share one process group, for time.

usage: engine_worker.py SPEC.json RESULT.json (written by rank 0), started with RANK, WORLD_SIZE, ... set
"""

import json
import math
import os
import sys
from pathlib import Path

import torch
from torch import distributed

from trainer.config.deepspeed_json import resolve_deepspeed
from trainer.config.derive import derive
from trainer.config.parallel import ParallelConfig
from trainer.config.run import Recipe
from trainer.core import environ
from trainer.data.batches import MicroBatch
from trainer.engine.base import Requests, StepPreview, TrainEngine
from trainer.engine.build import build_engine, join_group, leave_group
from trainer.models.config import hugging_face_config
from trainer.models.loss import LossSpec, cross_entropy_by_row
from trainer.parallel.topology import Topology, mesh_of
from trainer.verification.case import save_state

spec = json.load(open(sys.argv[1]))
tokens = torch.tensor(spec["tokens"])  # [steps, sequences, sequence + 1]
ranks = environ.detect(os.environ)
assert ranks is not None
poisoned = False
"""Set on one rank to make its loss NaN."""


def mesh(case: dict) -> Topology:
    return mesh_of(ParallelConfig.model_validate(case.get("parallel", {})), ranks.world_size)


def recipe_of(case: dict) -> Recipe:
    steps, sequences, length = tokens.shape
    micro = case.get("micro") or sequences // mesh(case).data // case.get("accumulation", 1)
    return Recipe.model_validate(
        {
            "run": {"directory": "unused", "steps": steps, "seed": spec["seed"]},
            "model": {"config": spec["config"], "dtype": case.get("dtype", "float32")} | case.get("model", {}),
            "data": {"train": [{"path": "unused"}], "sequence_length": length - 1},
            "batch": {"global_size": sequences, "micro_size": micro},
            "deepspeed": {"base": case.get("base", f"zero{case['stage']}")} | case.get("deepspeed", {}),
            "optimizer": {"learning_rate": spec["learning_rate"]} | case.get("optimizer", {}),
            "parallel": case.get("parallel", {}),
            "memory": {"activation_checkpointing": case.get("activation_checkpointing", "none")},
            "launch": {"processes": ranks.world_size},
        }
    )


def loss_function(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss = cross_entropy_by_row(logits, targets)
    return loss * math.nan if poisoned else loss


def engine_of(case: dict, *, from_scratch: bool = False) -> TrainEngine:
    recipe = recipe_of(case)
    resolved = resolve_deepspeed(recipe, derive(recipe, ranks.world_size))
    return build_engine(
        recipe,
        hugging_face_config(recipe.model),
        resolved,
        LossSpec("test", loss_function),
        ranks,
        from_scratch=from_scratch,
    )


def micro_batches(batch: torch.Tensor, case: dict) -> list[MicroBatch]:
    shape = mesh(case)
    accumulation = len(batch) // shape.data // case["micro"] if "micro" in case else case.get("accumulation", 1)
    micro, replica = len(batch) // shape.data // accumulation, shape.place(ranks.rank).data
    parts = []
    for index in range(accumulation):
        rows = batch[(index * shape.data + replica) * micro :][:micro]
        targets = rows[:, 1:].clone()
        targets[targets == spec["ignored"]] = -100
        parts.append(MicroBatch(rows[:, :-1].contiguous(), targets))
    return parts


def step(engine: TrainEngine, number: int, case: dict, accept=lambda preview: True):
    batches = micro_batches(tokens[number], case)
    return engine.train_batch(batches, accept, spec["learning_rate"], Requests())


def parity(case: dict) -> dict:
    engine = engine_of(case)
    results = [step(engine, number, case) for number in range(len(tokens))]
    engine.close()
    return {"steps": [[r.loss, r.grad_norm] for r in results], "target_tokens": [r.target_tokens for r in results]}


def growing(case: dict) -> dict:
    """Steps of other sizes, each the first sequences of its batch; with ``output`` the momentum after each is saved."""
    engine = engine_of(case)
    results = []
    for number, size in enumerate(case["sizes"]):
        batches, accepted = micro_batches(tokens[number][:size], case), number != case.get("veto")
        results.append(
            engine.train_batch(batches, lambda _, answer=accepted: answer, spec["learning_rate"], Requests())
        )
        if "output" in case:
            save_state(engine, "momentum", Path(case["output"]) / f"{case['name']}-{number}.safetensors")
        engine.evaluate(batches[:1])
    engine.close()
    return {"steps": [[r.loss, r.grad_norm] for r in results], "target_tokens": [r.target_tokens for r in results]}


def state_of(engine: TrainEngine) -> list[tuple]:
    return [(s.name, s.key, s.start, s.tensor.clone()) for s in engine.iterate_state()]


def veto(case: dict) -> dict:
    """A refused step, finite or NaN on one rank, changes nothing; the next one goes on as if it had not been."""
    global poisoned
    engine = engine_of(case)
    plain = engine_of(case)
    first = [step(e, 0, case).loss for e in (engine, plain)]
    before = state_of(engine)
    seen: list[StepPreview] = []
    if case["kind"] == "nan":
        poisoned = ranks.rank == ranks.world_size - 1
        refused = step(
            engine, 1, case, lambda p: seen.append(p) or (math.isfinite(p.loss) and math.isfinite(p.grad_norm))
        )
        poisoned = False
    else:
        refused = step(engine, 1, case, lambda p: seen.append(p) or False)
    unchanged = all(a[:3] == b[:3] and torch.equal(a[3], b[3]) for a, b in zip(before, state_of(engine), strict=True))
    after = [[r.loss, r.grad_norm] for r in (step(engine, 2, case), step(engine, 3, case))]
    expected = [[r.loss, r.grad_norm] for r in (step(plain, 2, case), step(plain, 3, case))]
    engine.close()
    plain.close()
    return {
        "first": first, "asked": len(seen), "applied": refused.applied, "unchanged": unchanged,
        "finite": math.isfinite(refused.loss + refused.grad_norm), "after": after, "expected": expected,
    }  # fmt: skip


def weights(case: dict) -> dict:
    """Checksums of all initial weights, gathered whole from the slices of every rank."""
    engine = engine_of(case)
    parts: list = [None] * ranks.world_size
    mine = [
        (s.name, s.shape, s.start, s.tensor.float().tolist())
        for s in engine.iterate_state()
        if s.primary and s.key == "weight"
    ]
    distributed.all_gather_object(parts, mine)
    engine.close()
    whole: dict[str, torch.Tensor] = {}
    for name, shape, start, values in (piece for part in parts for piece in part):
        tensor = whole.setdefault(name, torch.full((math.prod(shape),), math.nan))
        tensor[start : start + len(values)] = torch.tensor(values)
    return {
        name: [tensor.double().sum().item(), tensor.double().abs().sum().item()]
        for name, tensor in sorted(whole.items())
    }


CASES = {"parity": parity, "growing": growing, "veto": veto, "weights": weights}

environ.die_with_parent(os.environ)
environ.export(ranks, os.environ)
join_group(ranks)
results = []
for case in spec["cases"]:
    torch.manual_seed(0)
    config = spec["config"]
    spec["config"] = case.get("config", config)
    results.append(case | {"result": CASES[case["check"]](case)})
    spec["config"] = config
if ranks.rank == 0:
    json.dump(results, open(sys.argv[2], "w"))
leave_group()
os._exit(0)
