"""Learning-rate multipliers: known values, an independent reference, and what must hold for all settings."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.optimizer import ScheduleConfig
from trainer.optim.schedules import multiplier

pytestmark = pytest.mark.fast


def schedule(**values: Any) -> ScheduleConfig:
    return ScheduleConfig.model_validate(values)


@pytest.mark.parametrize(
    ("settings", "step", "expected"),
    [
        ({"name": "cosine", "warmup_steps": 20}, 1, 1 / 20),
        ({"name": "cosine", "warmup_steps": 20}, 10, 0.5),
        ({"name": "cosine", "warmup_steps": 20}, 20, 1.0),
        ({"name": "cosine", "warmup_steps": 20}, 110, 0.55),
        ({"name": "cosine", "warmup_steps": 20}, 200, 0.1),
        ({"name": "cosine", "warmup_steps": 20}, 1000, 0.1),
        ({"name": "cosine", "warmup_steps": 0, "minimum_ratio": 0.0}, 50, 0.5 + math.sqrt(0.5) / 2),
        ({"name": "cosine", "warmup_steps": 20, "decay_steps": 120}, 70, 0.55),
        ({"name": "cosine", "warmup_steps": 20, "decay_steps": 120}, 120, 0.1),
        (
            {"name": "cosine", "warmup_steps": 20, "decay_steps": 400},
            200,
            0.1 + 0.45 * (1 + math.cos(math.pi * 9 / 19)),
        ),
        ({"name": "linear", "warmup_steps": 20}, 20, 1.0),
        ({"name": "linear", "warmup_steps": 20}, 110, 0.55),
        ({"name": "linear", "warmup_steps": 20, "minimum_ratio": 0.0}, 200, 0.0),
        ({"name": "constant", "warmup_steps": 20}, 10, 0.5),
        ({"name": "constant", "warmup_steps": 20}, 200, 1.0),
        ({"name": "linear", "warmup_steps": 300}, 200, 2 / 3),
        ({"name": "wsd", "warmup_steps": 20}, 10, 0.5),
        ({"name": "wsd", "warmup_steps": 20}, 180, 1.0),
        ({"name": "wsd", "warmup_steps": 20}, 190, 0.55),
        ({"name": "wsd", "warmup_steps": 20}, 200, 0.1),
        ({"name": "wsd", "warmup_steps": 20, "decay_ratio": 1.0}, 110, 0.55),
        ({"name": "wsd", "warmup_steps": 0, "decay_steps": 100, "decay_ratio": 0.5, "minimum_ratio": 0.0}, 75, 0.5),
        ({"name": "inverse_sqrt", "warmup_steps": 50}, 25, 0.5),
        ({"name": "inverse_sqrt", "warmup_steps": 50}, 200, 0.5),
        ({"name": "inverse_sqrt", "warmup_steps": 50}, 50_000, 0.1),
    ],
)
def test_known_values_of_a_run_of_200_steps(settings: dict[str, Any], step: int, expected: float) -> None:
    assert multiplier(schedule(**settings), step, 200) == pytest.approx(expected, rel=1e-12)


SCHEDULES = st.builds(
    schedule,
    name=st.sampled_from(["cosine", "linear", "constant"]),
    warmup_steps=st.integers(0, 50),
    minimum_ratio=st.floats(0, 1),
    decay_steps=st.none() | st.integers(1, 300),
)


@given(SCHEDULES, st.integers(1, 200))
def test_shape(config: ScheduleConfig, total_steps: int) -> None:
    values = [multiplier(config, step, total_steps) for step in range(1, total_steps + 50)]
    assert all(0.0 <= value <= 1.0 for value in values)
    warmup = config.warmup_steps
    assert values[:warmup] == [step / warmup for step in range(1, warmup + 1)][: len(values)]
    after = values[warmup:]
    assert all(later <= earlier for earlier, later in itertools.pairwise(after))
    end = max(config.decay_steps or total_steps, warmup + 1)
    tail = values[end - 1 :]
    assert set(tail) <= {1.0 if config.name == "constant" else config.minimum_ratio}
    if config.name != "constant":
        assert all(value >= config.minimum_ratio for value in after)


@given(SCHEDULES, st.integers(1, 200), st.integers(1, 200))
def test_extending_a_run_changes_nothing_when_decay_steps_is_set(
    config: ScheduleConfig, total_steps: int, step: int
) -> None:
    fixed = config.model_copy(update={"decay_steps": config.decay_steps or 100})
    assert multiplier(fixed, step, total_steps) == multiplier(fixed, step, total_steps * 3)


def test_cosine_agrees_with_torch() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=180, eta_min=0.1)
    config = schedule(name="cosine", warmup_steps=20, minimum_ratio=0.1)
    for step in range(20, 201):
        assert multiplier(config, step, 200) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("step", [0, -1])
def test_steps_count_from_one(step: int) -> None:
    with pytest.raises(ValueError, match="count from 1"):
        multiplier(schedule(), step, 10)
