"""Runs with experts spread over ranks: killed and resumed, resumed at other degrees, with experts that get no token."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import STEPS, Trainer
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.checkpoint.export import export_checkpoint

EXPERT = {"parallel": {"expert": 2}}
MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    with Trainer(tmp_path_factory.mktemp("expert")) as made:
        yield made


@pytest.mark.parametrize(
    ("base", "dtype", "world"), [("zero2", "bfloat16", 2), pytest.param("zero0", "float32", 4, marks=pytest.mark.sweep)]
)
def test_killed_and_resumed_equals_undisturbed(trainer: Trainer, base: str, dtype: str, world: int) -> None:
    run = f"{base}-{dtype}"
    model = {"config": MIXTRAL, "dtype": dtype}
    batch = {"global_size": 8, "micro_size": 1}
    straight = trainer.recipe(f"{run}-straight", model=model, batch=batch, deepspeed={"base": base}, **EXPERT)
    trainer.check(trainer.train(straight, world=world), straight)
    killed = trainer.recipe(f"{run}-killed", model=model, batch=batch, deepspeed={"base": base}, **EXPERT)
    assert trainer.train(killed, world=world, faults="train.step:*:13:kill") == [-9] * world
    trainer.check(trainer.train(killed, world=world), killed)
    assert trainer.metrics(f"{run}-killed") == trainer.metrics(f"{run}-straight")
    export_checkpoint(trainer.directory / f"{run}-killed", trainer.directory / f"{run}-export")


@pytest.fixture(scope="module")
def whole(trainer: Trainer) -> Path:
    recipe = trainer.recipe("whole", model={"config": MIXTRAL})
    trainer.check(trainer.train(recipe), recipe)
    return trainer.directory / "whole"


@pytest.fixture(scope="module")
def spread(trainer: Trainer) -> Path:
    recipe = trainer.recipe("spread", model={"config": MIXTRAL}, **EXPERT)
    trainer.check(trainer.train(recipe), recipe)
    return trainer.directory / "spread"


@pytest.mark.parametrize(
    ("source", "base", "parallel"),
    [("spread", "zero3", {}), ("whole", "zero2", {"expert": 2}), ("spread", "zero1", {"tensor": 2})],
)
def test_a_checkpoint_resumes_at_other_degrees(
    trainer: Trainer, whole: Path, spread: Path, source: str, base: str, parallel: dict[str, int]
) -> None:
    expected, same = trainer.metrics("whole"), trainer.metrics("spread")
    assert max(abs(same[key] - expected[key]) for key in expected) < 1e-5
    run = f"{source}-as-{base}"
    shutil.copytree(trainer.directory / source, trainer.directory / run)
    shutil.rmtree(trainer.directory / run / "checkpoints" / f"step-{STEPS:08d}")
    recipe = trainer.recipe(run, model={"config": MIXTRAL}, deepspeed={"base": base}, parallel=parallel)
    trainer.check(trainer.train(recipe), recipe)
    assert trainer.status(run)["resumed_step"] == 10
    found = trainer.metrics(run)
    assert max(abs(found[key] - expected[key]) for key in expected) < 1e-5


def test_a_rank_whose_experts_get_no_token_hangs_nobody(trainer: Trainer) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MIXTRAL))
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate.weight.zero_()  # all alike: the first two experts, both of rank 0, win every time
    model.save_pretrained(trainer.directory / "starving")
    sections = {"model": {"path": str(trainer.directory / "starving"), "config": None, "freeze": [r"mlp\.gate\."]}}
    runs: dict[str, dict[tuple[int, str], float]] = {}
    for name, settings in {"alone": {}, "spread": EXPERT, "sharded": {"deepspeed": {"base": "zero3"}}}.items():
        recipe = trainer.recipe(f"starving-{name}", **sections, **settings)
        trainer.check(trainer.train(recipe, "run.steps=4", "checkpoint.every_steps=2"), recipe)
        runs[name] = trainer.metrics(f"starving-{name}")
    for found in (runs["spread"], runs["sharded"]):
        assert max(abs(found[key] - runs["alone"][key]) for key in runs["alone"]) < 1e-5
