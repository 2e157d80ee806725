"""Which evaluation is the best, when a run stops for want of a better one, and how both survive a restart."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.run import Recipe
from trainer.core.errors import CheckpointError
from trainer.evaluation.best import BestEvaluation, metric_loss, metric_name, stopping_reason
from trainer.training.state import TrainState

pytestmark = pytest.mark.fast

LOSSES = st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=20)


def recipe_of(names: tuple[str, ...] = ("a",), **stopping: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"directory": "runs/x", "steps": 4},
            "model": {"config": {"model_type": "llama"}},
            "data": {
                "train": [{"path": "t"}],
                "validation": [{"name": name, "path": name} for name in names],
                "sequence_length": 16,
            },
            "batch": {"global_size": 2},
            "evaluation": {"every_steps": 1, "early_stopping": stopping or None},
        }
    )


def counted(losses: list[float], minimum_delta: float = 0.0) -> BestEvaluation:
    best = BestEvaluation()
    for step, loss in enumerate(losses):
        best.note("a", step, loss, minimum_delta)
    return best


def test_the_lowest_loss_is_the_best_and_the_first_of_equals() -> None:
    best = counted([3.0, 2.0, 2.5, 2.0, math.nan])
    assert (best.loss, best.step, best.without_improvement) == (2.0, 1, 3)


def test_small_steps_add_up_to_an_improvement() -> None:
    best = counted([3.0, 2.96, 2.92, 2.88, 2.85], minimum_delta=0.1)
    assert (best.loss, best.step) == (2.85, 4)
    assert (best.counted_loss, best.without_improvement) == (2.88, 1)


@given(LOSSES)
def test_without_a_minimum_the_counter_is_the_distance_to_the_best(losses: list[float]) -> None:
    best = counted(losses)
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert best.loss == (min(finite) if finite else None)
    assert best.counted_loss == best.loss
    assert best.without_improvement == (len(losses) - 1 - best.step if finite else len(losses))


@given(LOSSES, st.integers(0, 20), st.floats(0, 2))
def test_a_restart_anywhere_counts_the_same(losses: list[float], at: int, minimum_delta: float) -> None:
    state = TrainState(best=counted(losses[:at], minimum_delta))
    restored = TrainState.from_json(json.loads(json.dumps(state.to_json())))
    assert restored == state
    for step, loss in list(enumerate(losses))[at:]:
        restored.best.note("a", step, loss, minimum_delta)
    assert restored.best == counted(losses, minimum_delta)


def test_states_of_older_trainers_have_no_best() -> None:
    values = TrainState(step=7, evaluated_step=5).to_json()
    del values["best"]
    assert TrainState.from_json(values) == TrainState(step=7, evaluated_step=5)


@pytest.mark.parametrize(
    "best", [None, [], {"loss": "low"}, {"step": None}, {"name": 3}, {"without_improvement": True}]
)
def test_a_state_that_makes_no_sense_is_refused(best: object) -> None:
    with pytest.raises(CheckpointError, match="best evaluation"):
        TrainState.from_json(TrainState().to_json() | {"best": best})


def test_what_counts_has_a_name() -> None:
    assert metric_name(recipe_of()) == "a"
    assert metric_name(recipe_of(("a", "b"))) == "mean of a, b"
    assert metric_name(recipe_of(("a", "b"), patience=1, metric="b")) == "b"
    assert metric_name(recipe_of(())) == ""
    losses = [("a", 1.0), ("b", 3.0)]
    assert metric_loss(recipe_of(("a", "b")), losses) == 2.0
    assert metric_loss(recipe_of(("a", "b"), patience=1, metric="b"), losses) == 3.0


def test_patience_is_counted_in_evaluations_of_the_same_metric() -> None:
    recipe = recipe_of(patience=2)
    assert stopping_reason(recipe, counted([3.0, 3.5])) is None
    expected = "early stopping: no improvement of a in 2 evaluations; best 3.0000 at step 0"
    assert stopping_reason(recipe, counted([3.0, 3.5, 3.1])) == expected
    assert stopping_reason(recipe, counted([math.nan, math.nan])) == expected.partition(";")[0]
    assert stopping_reason(recipe_of(), counted([3.0] * 9)) is None
    assert stopping_reason(recipe_of(("a", "b"), patience=2), counted([3.0] * 9)) is None
    other = counted([3.0] * 9)
    other.note("b", 9, 5.0, 0.0)
    assert (other.loss, other.step, other.without_improvement) == (5.0, 9, 0)
