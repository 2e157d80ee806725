"""Runs in pipeline stages: killed and resumed, resumed at other shapes, exported, refused before a weight changes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import STEPS, Trainer, tensors
from safetensors.torch import load_file

from trainer.checkpoint.export import export_checkpoint
from trainer.evaluation.standalone import evaluate_model

STAGES = {"parallel": {"pipeline": 2}}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    with Trainer(tmp_path_factory.mktemp("pipeline")) as made:
        yield made


@pytest.mark.parametrize(
    ("base", "dtype", "world"),
    [("zero1", "bfloat16", 2), ("zero1", "float32", 4), pytest.param("zero0", "float32", 2, marks=pytest.mark.sweep)],
)
def test_killed_and_resumed_equals_undisturbed(trainer: Trainer, base: str, dtype: str, world: int) -> None:
    run = f"{base}-{dtype}-{world}"
    settings: dict[str, Any] = {"model": {"dtype": dtype}, "deepspeed": {"base": base}, **STAGES}
    straight = trainer.recipe(f"{run}-straight", **settings)
    trainer.check(trainer.train(straight, world=world), straight)
    killed = trainer.recipe(f"{run}-killed", **settings)
    assert trainer.train(killed, world=world, faults="train.step:*:13:kill") == [-9] * world
    trainer.check(trainer.train(killed, world=world), killed)
    assert trainer.metrics(f"{run}-killed") == trainer.metrics(f"{run}-straight")
    expected, found = tensors(trainer.directory / f"{run}-straight"), tensors(trainer.directory / f"{run}-killed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_batch_warmup_killed_and_resumed_computes_what_the_whole_model_does(trainer: Trainer) -> None:
    batch = {"global_size": 12, "micro_size": 2, "warmup": {"start_size": 2, "increment": 2, "steps": 15}}
    whole = trainer.recipe("warmup-whole", dropout=0.0, batch=batch)
    trainer.check(trainer.train(whole, world=1), whole)
    killed = trainer.recipe("warmup-killed", dropout=0.0, batch=batch, **STAGES)
    assert trainer.train(killed, faults="train.step:*:13:kill") == [-9, -9]
    trainer.check(trainer.train(killed), killed)
    assert trainer.status("warmup-killed")["resumed_step"] == 10
    expected, found = trainer.metrics("warmup-whole"), trainer.metrics("warmup-killed")
    assert found.keys() == expected.keys()
    assert max(abs(found[key] - expected[key]) for key in expected) < 1e-5


@pytest.fixture(scope="module")
def whole(trainer: Trainer) -> Path:
    """A run without stages, dropout off: other layouts must compute what it does."""
    recipe = trainer.recipe("whole", dropout=0.0)
    trainer.check(trainer.train(recipe), recipe)
    return trainer.directory / "whole"


@pytest.fixture(scope="module")
def staged(trainer: Trainer) -> Path:
    recipe = trainer.recipe("staged", dropout=0.0, **STAGES)
    trainer.check(trainer.train(recipe), recipe)
    return trainer.directory / "staged"


def test_stages_compute_what_the_whole_model_does(trainer: Trainer, whole: Path, staged: Path) -> None:
    expected, found = trainer.metrics("whole"), trainer.metrics("staged")
    assert found.keys() == expected.keys()
    assert max(abs(found[key] - expected[key]) for key in expected) < 1e-5


@pytest.mark.parametrize(
    ("source", "base", "pipeline", "world"),
    [("staged", "zero3", 1, 2), ("staged", "zero1", 1, 1), ("staged", "zero1", 2, 4), ("whole", "zero1", 2, 2)],
)
def test_a_checkpoint_resumes_in_other_stages(
    trainer: Trainer, whole: Path, staged: Path, source: str, base: str, pipeline: int, world: int
) -> None:
    run = f"{source}-as-{base}-{pipeline}-{world}"
    shutil.copytree(trainer.directory / source, trainer.directory / run)
    shutil.rmtree(trainer.directory / run / "checkpoints" / f"step-{STEPS:08d}")
    recipe = trainer.recipe(run, dropout=0.0, deepspeed={"base": base}, parallel={"pipeline": pipeline})
    trainer.check(trainer.train(recipe, world=world), recipe)
    assert trainer.status(run)["resumed_step"] == 10
    expected, found = trainer.metrics("whole"), trainer.metrics(run)
    assert max(abs(found[key] - expected[key]) for key in expected) < 1e-5


def test_exports_are_the_same_with_and_without_stages(trainer: Trainer, tmp_path: Path) -> None:
    for name, sections in (("sgd-whole", {}), ("sgd-staged", STAGES)):
        # AdamW turns the rounding of a sum in another order into a step of the learning rate; SGD does not.
        optimizer = {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}
        recipe = trainer.recipe(name, dropout=0.0, optimizer=optimizer, **sections)
        trainer.check(trainer.train(recipe), recipe)
        export_checkpoint(trainer.directory / name, tmp_path / name)
    expected = load_file(tmp_path / "sgd-whole" / "model.safetensors")
    found = load_file(tmp_path / "sgd-staged" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert max((expected[key] - found[key]).abs().max().item() for key in expected) < 1e-6


def test_frozen_parameters_stay_and_a_stage_without_any_to_train_is_refused(trainer: Trainer) -> None:
    frozen = trainer.recipe("frozen", dropout=0.0, model={"freeze": [r"wte|h\.0\."]}, **STAGES)
    trainer.check(trainer.train(frozen, "run.steps=4", "checkpoint.every_steps=2"), frozen)
    states = tensors(trainer.directory / "frozen")
    assert ("transformer.wte.weight", "weight") in states
    assert ("transformer.wte.weight", "exp_avg") not in states
    assert ("transformer.wpe.weight", "exp_avg") in states
    refused = trainer.recipe("all-frozen", model={"freeze": [r"wte|wpe|h\.0\."]}, **STAGES)
    assert set(trainer.train(refused)) == {2}
    assert "nothing to train in pipeline stage 0" in refused.with_suffix(".out").read_text()


def test_documents_do_not_see_each_other(trainer: Trainer) -> None:
    packed = {"packing": "documents", "mask_documents": True}
    for name, sections in (("packed-whole", {}), ("packed-staged", STAGES)):
        recipe = trainer.recipe(name, dropout=0.0, data=packed, **sections)
        trainer.check(trainer.train(recipe), recipe)
    expected, found = trainer.metrics("packed-whole"), trainer.metrics("packed-staged")
    assert max(abs(found[key] - expected[key]) for key in expected) < 1e-5


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_padded_vocabulary_gets_no_probability_and_is_cut_off(
    trainer: Trainer, tmp_path: Path, pipeline: int
) -> None:
    run = f"padded-{pipeline}"
    recipe = trainer.recipe(
        run,
        dropout=0.0,
        model={"vocabulary_multiple": 384},
        parallel={"pipeline": pipeline},
        evaluation={"batches": None},
    )
    trainer.check(trainer.train(recipe, "run.steps=4"), recipe)
    assert {key[0]: value.shape[0] for key, value in tensors(trainer.directory / run).items()}[
        "transformer.wte.weight"
    ] == 768
    export_checkpoint(trainer.directory / run, tmp_path / "export")
    assert load_file(tmp_path / "export" / "model.safetensors")["transformer.wte.weight"].shape[0] == 512
    found = evaluate_model(str(tmp_path / "export"), trainer.directory / "valid", sequence_length=32, batch_size=4)
    assert abs(found["loss"] - trainer.metrics(run)[4, "evaluation"]) < 1e-5


def test_a_padded_run_resumes_and_keeps_documents_apart(trainer: Trainer) -> None:
    """Whether it does is asked of the model with random tokens: none of them may be padding, which is no target."""
    keys = {"model": {"vocabulary_multiple": 8192}, "data": {"mask_documents": True}}
    for steps in (2, 4):
        recipe = trainer.recipe("padded-resumed", dropout=0.0, **keys, **STAGES)
        trainer.check(trainer.train(recipe, f"run.steps={steps}", "checkpoint.every_steps=2"), recipe)
    assert trainer.status("padded-resumed")["resumed_step"] == 2
