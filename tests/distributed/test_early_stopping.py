"""Runs that end because evaluations get no better, and checkpoints of the best one: also when killed in between."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_runs import STEPS, Trainer

from trainer.checkpoint import layout
from trainer.config.load import load_recipe
from trainer.evaluation.standalone import evaluate_model
from trainer.launch.status import collect
from trainer.launch.status_text import describe
from trainer.training.starting import nothing_to_do

STOPPING = {"every_steps": 2, "early_stopping": {"patience": 3, "minimum_delta": 10.0}}
"""The first evaluation is an improvement, no other is by 10 nats: the run ends after the one at step 6."""


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    with Trainer(tmp_path_factory.mktemp("stopping")) as made:
        yield made


def steps_held(run: Path) -> list[int]:
    return [step for step, _ in layout.step_directories(run)]


def best_in(run: Path, step: int) -> dict[str, Any]:
    manifest = layout.read_manifest(layout.step_directory(run, step))
    assert manifest is not None
    return manifest["state"]["train"]["best"]


@pytest.mark.parametrize(
    "settings",
    [pytest.param({}, id="ranks"), pytest.param({"parallel": {"pipeline": 2}}, id="stages", marks=pytest.mark.sweep)],
)
def test_a_run_ends_finished_and_goes_on_with_more_patience(trainer: Trainer, settings: dict[str, Any]) -> None:
    run = f"patience-{len(settings)}"
    straight = trainer.recipe(f"{run}-straight", evaluation={"every_steps": 2}, **settings)
    trainer.check(trainer.train(straight), straight)
    recipe = trainer.recipe(run, evaluation=STOPPING, checkpoint={"every_steps": 50}, **settings)
    trainer.check(trainer.train(recipe), recipe)
    directory, words = trainer.directory / run, "early stopping: no improvement of v in 3 evaluations; best "
    status = trainer.status(run)
    assert (status["state"], status["exit_code"], status["step"]) == ("finished", 0, 6)
    assert status["reason"].startswith(words)
    assert steps_held(directory) == [6]
    losses = {step: loss for (step, kind), loss in trainer.metrics(run).items() if kind == "evaluation"}
    assert list(losses) == [0, 2, 4, 6]
    best = min(losses, key=lambda step: losses[step])
    assert (status["best_validation_loss"], status["best_step"]) == (losses[best], best)
    assert f"{losses[best]:.4f} at its best, step {best}" in describe(collect(directory))

    # asked again: nothing is trained, and both ways to start say so
    before = trainer.metrics(run)
    trainer.check(trainer.train(recipe), recipe)
    assert trainer.metrics(run) == before
    status = trainer.status(run)
    assert (status["state"], status["step"], status["best_step"]) == ("finished", 6, best)
    assert status["reason"].startswith(words)
    said = recipe.with_suffix(".out").read_text()
    assert said.count(f"finished 6 of {STEPS} steps in {directory}: {words}") == 1
    assert f"already finished: at step 6, {STEPS} asked for, in {directory}: {words}" in said
    said = nothing_to_do(load_recipe(recipe), STEPS)
    assert said is not None
    assert words in said
    more = ["evaluation.early_stopping.patience=5"]
    assert nothing_to_do(load_recipe(recipe, more), STEPS) is None

    trainer.check(trainer.train(recipe, *more), recipe)
    assert (trainer.status(run)["step"], steps_held(directory)) == (10, [6, 10])
    expected = trainer.metrics(f"{run}-straight")
    assert trainer.metrics(run) == {key: loss for key, loss in expected.items() if key[0] <= 10}
    trainer.check(trainer.train(recipe, "evaluation.early_stopping=null"), recipe)
    assert trainer.metrics(run) == expected
    assert trainer.status(run)["reason"] is None


@pytest.mark.parametrize("at", [5, pytest.param(7, marks=pytest.mark.sweep), 9])
def test_killed_and_resumed_it_ends_at_the_same_step(trainer: Trainer, at: int) -> None:
    """Checkpoints lie at 4 and 8, evaluations at even steps: counted once each, whichever were done before the kill."""
    evaluation = {"every_steps": 2, "early_stopping": {"patience": 2, "minimum_delta": 0.15}}
    settings: dict[str, Any] = {"evaluation": evaluation, "checkpoint": {"every_steps": 4}}
    straight = trainer.recipe("kill-straight", **settings)
    if not (trainer.directory / "kill-straight").exists():
        trainer.check(trainer.train(straight), straight)
    end = trainer.status("kill-straight")["step"]
    assert end == 12
    run = f"kill-{at}"
    killed = trainer.recipe(run, **settings)
    assert trainer.train(killed, faults=f"train.step:*:{at}:kill") == [-9, -9]
    trainer.check(trainer.train(killed), killed)
    assert trainer.status(run)["resumed_step"] == 4 * (at // 4)
    assert trainer.status(run)["reason"] == trainer.status("kill-straight")["reason"]
    assert trainer.metrics(run) == trainer.metrics("kill-straight")
    assert best_in(trainer.directory / run, end) == best_in(trainer.directory / "kill-straight", end)


def test_a_stop_by_signal_between_evaluations_counts_none_of_them_twice(trainer: Trainer) -> None:
    """Stopped after step 4, whose evaluation is done by the next start."""
    straight = trainer.recipe("signal-straight", evaluation=STOPPING)
    trainer.check(trainer.train(straight), straight)
    recipe = trainer.recipe("signal", evaluation=STOPPING)
    assert trainer.train(recipe, faults="train.step:1:4:signal") == [75, 75]
    trainer.check(trainer.train(recipe), recipe)
    assert trainer.metrics("signal") == trainer.metrics("signal-straight")
    assert trainer.status("signal")["reason"] == trainer.status("signal-straight")["reason"]


DIVERGING: dict[str, Any] = {
    "optimizer": {"learning_rate": 0.3},
    "schedule": {"name": "linear", "warmup_steps": STEPS},
    "evaluation": {"every_steps": 2},
    "checkpoint": {"every_steps": None, "keep_last": 1, "keep_best": True},
}
"""The learning rate rises until the loss does."""


def test_the_best_checkpoint_is_saved_and_kept(trainer: Trainer) -> None:
    recipe = trainer.recipe("best", **DIVERGING)
    trainer.check(trainer.train(recipe), recipe)
    losses = {step: loss for (step, kind), loss in trainer.metrics("best").items() if kind == "evaluation"}
    best = min(losses, key=lambda step: losses[step])
    assert 0 < best < STEPS - 4  # checkpoints are saved after it, or nothing were shown
    directory = trainer.directory / "best"
    assert steps_held(directory) == [best, STEPS]
    assert best_in(directory, STEPS)["step"] == best
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line.get("kind") == "evaluation"][-1]
    assert (last["best_validation_loss"], last["best_step"]) == (losses[best], best)
    # its weights are those that were evaluated
    shutil.rmtree(layout.step_directory(directory, STEPS))
    found = evaluate_model(str(directory), trainer.directory / "valid", sequence_length=32, batch_size=4)
    assert abs(found["loss"] - losses[best]) < 1e-4


def test_the_best_checkpoint_outlives_kills_and_milestones(trainer: Trainer) -> None:
    checkpoint = {"every_steps": 3, "keep_last": 1, "keep_best": True, "asynchronous": True}
    settings = DIVERGING | {"checkpoint": checkpoint}
    straight = trainer.recipe("outlives-straight", **settings)
    trainer.check(trainer.train(straight), straight)
    recipe = trainer.recipe("outlives", **settings)
    assert trainer.train(recipe, faults="train.step:*:17:kill") == [-9, -9]
    trainer.check(trainer.train(recipe), recipe)
    best = trainer.status("outlives")["best_step"]
    assert (
        steps_held(trainer.directory / "outlives")
        == steps_held(trainer.directory / "outlives-straight")
        == [best, STEPS]
    )
    assert trainer.metrics("outlives") == trainer.metrics("outlives-straight")


def test_one_source_may_be_what_counts_and_another_metric_counts_anew(trainer: Trainer) -> None:
    data = {
        "train": [{"path": str(trainer.directory / "train")}],
        "validation": [
            {"name": "v", "path": str(trainer.directory / "valid")},
            {"name": "seen", "path": str(trainer.directory / "train")},
        ],
    }
    evaluation = {"every_steps": 2, "batches": 1, "early_stopping": {"patience": 2, "minimum_delta": 10.0}}
    recipe = trainer.recipe("metric", data=data, evaluation=evaluation)
    trainer.check(trainer.train(recipe, "evaluation.early_stopping.metric=seen"), recipe)
    directory = trainer.directory / "metric"
    assert trainer.status("metric")["reason"].startswith("early stopping: no improvement of seen in 2 evaluations")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    seen = [line for line in lines if line.get("name") == "seen"]
    assert [line["step"] for line in seen] == [0, 2, 4]
    assert seen[-1]["best_validation_loss"] == min(line["validation_loss"] for line in seen)
    assert all(line["best_step"] is None for line in lines if line.get("name") == "v")
    # the mean of both was not counted so far: one evaluation to begin with, then two more
    trainer.check(trainer.train(recipe), recipe)
    assert trainer.status("metric")["step"] == 10
    assert trainer.status("metric")["reason"].startswith("early stopping: no improvement of mean of v, seen in 2")
