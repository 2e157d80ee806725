"""Runs on tensor ranks: killed and resumed, resumed at other degrees, exported, dropout alike on all ranks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_runs import STEPS, Trainer
from safetensors.torch import load_file

from trainer.checkpoint.export import export_checkpoint

TENSOR = {"parallel": {"tensor": 2}}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    with Trainer(tmp_path_factory.mktemp("tensor")) as made:
        yield made


@pytest.mark.parametrize(
    ("base", "dtype"),
    [("zero0", "float32"), ("zero2", "bfloat16"), pytest.param("zero0", "bfloat16", marks=pytest.mark.sweep)],
)
def test_killed_and_resumed_equals_undisturbed(trainer: Trainer, base: str, dtype: str) -> None:
    run = f"{base}-{dtype}"  # with dropout: ranks that drew apart would not end in the same weights twice
    settings: dict[str, Any] = {"model": {"dtype": dtype}, "deepspeed": {"base": base}, **TENSOR}
    straight = trainer.recipe(f"{run}-straight", **settings)
    trainer.check(trainer.train(straight), straight)
    killed = trainer.recipe(f"{run}-killed", **settings)
    assert trainer.train(killed, faults="train.step:*:13:kill") == [-9, -9]
    trainer.check(trainer.train(killed), killed)
    assert trainer.metrics(f"{run}-killed") == trainer.metrics(f"{run}-straight")


@pytest.fixture(scope="module")
def whole(trainer: Trainer) -> Path:
    recipe = trainer.recipe("whole", dropout=0.0)
    trainer.check(trainer.train(recipe), recipe)
    return trainer.directory / "whole"


@pytest.fixture(scope="module")
def divided(trainer: Trainer) -> Path:
    recipe = trainer.recipe("divided", dropout=0.0, **TENSOR)
    trainer.check(trainer.train(recipe), recipe)
    return trainer.directory / "divided"


def test_tensor_ranks_compute_what_the_whole_model_does(trainer: Trainer, whole: Path, divided: Path) -> None:
    expected, found = trainer.metrics("whole"), trainer.metrics("divided")
    assert found.keys() == expected.keys()
    assert max(abs(found[key] - expected[key]) for key in expected) < 1e-5


@pytest.mark.parametrize(
    ("source", "base", "parallel", "world"),
    [
        ("divided", "zero3", {}, 2),
        ("divided", "zero1", {"tensor": 2, "pipeline": 2}, 4),
        ("divided", "zero1", {"tensor": 2}, 4),
        ("whole", "zero2", {"tensor": 2}, 2),
    ],
)
def test_a_checkpoint_resumes_at_other_degrees(
    trainer: Trainer, whole: Path, divided: Path, source: str, base: str, parallel: dict[str, int], world: int
) -> None:
    run = f"{source}-as-{base}-{'-'.join(map(str, parallel.values()))}-{world}"
    shutil.copytree(trainer.directory / source, trainer.directory / run)
    shutil.rmtree(trainer.directory / run / "checkpoints" / f"step-{STEPS:08d}")
    recipe = trainer.recipe(run, dropout=0.0, deepspeed={"base": base}, parallel=parallel)
    trainer.check(trainer.train(recipe, world=world), recipe)
    assert trainer.status(run)["resumed_step"] == 10
    expected, found = trainer.metrics("whole"), trainer.metrics(run)
    assert max(abs(found[key] - expected[key]) for key in expected) < 1e-5


def test_exports_are_the_same_with_and_without_tensor_ranks(trainer: Trainer, tmp_path: Path) -> None:
    for name, sections in (("sgd-whole", {}), ("sgd-divided", TENSOR)):
        optimizer = {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}
        recipe = trainer.recipe(name, dropout=0.0, optimizer=optimizer, **sections)
        trainer.check(trainer.train(recipe), recipe)
        export_checkpoint(trainer.directory / name, tmp_path / name)
    expected = load_file(tmp_path / "sgd-whole" / "model.safetensors")
    found = load_file(tmp_path / "sgd-divided" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert max((expected[key] - found[key]).abs().max().item() for key in expected) < 1e-6


def test_frozen_parameters_stay(trainer: Trainer) -> None:
    recipe = trainer.recipe("frozen", dropout=0.0, model={"freeze": [r"wte|h\.0\."]}, **TENSOR)
    trainer.check(trainer.train(recipe, "run.steps=4", "checkpoint.every_steps=2"), recipe)


def test_ranks_that_become_tensor_ranks_draw_alike(trainer: Trainer) -> None:
    """Two replicas' generators differ; two halves of a model that went on with them would drop other activations."""
    source = trainer.recipe("replicas")
    trainer.check(trainer.train(source, "run.steps=12", "checkpoint.every_steps=10"), source)
    shutil.rmtree(trainer.directory / "replicas" / "checkpoints" / "step-00000012")
    for name in ("replicas-alone", "replicas-divided", "alone-divided"):
        origin = "replicas-alone" if name == "alone-divided" else "replicas"
        shutil.copytree(trainer.directory / origin, trainer.directory / name)
        if name == "replicas-alone":  # one process writes the same state again, and with it one generator
            recipe = trainer.recipe(name)
            trainer.check(trainer.train(recipe, "run.steps=11", world=1, before="save_at_start"), recipe)
            shutil.rmtree(trainer.directory / name / "checkpoints" / "step-00000011")
        else:
            recipe = trainer.recipe(name, **TENSOR)
            trainer.check(trainer.train(recipe, "run.steps=14"), recipe)
            assert trainer.status(name)["resumed_step"] == 10
    expected, found = trainer.metrics("alone-divided"), trainer.metrics("replicas-divided")
    later = [key for key in expected if key[0] > 10]
    assert len(later) > 3
    assert max(abs(found[key] - expected[key]) for key in later) < 1e-5
    assert "on as many, divided otherwise" in trainer.recipe("replicas-divided").with_suffix(".out").read_text()
