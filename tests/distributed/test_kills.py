"""The short version of kill_sweep.py: a run of ZeRO-2 and one in pipeline stages, each killed 8 times as it saves."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from forked_runs import Trainer
from kill_sweep import LAYOUTS, Sweep


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    with Trainer(tmp_path_factory.mktemp("kills")) as made:
        yield made


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_a_run_killed_again_and_again_ends_as_one_left_in_peace(trainer: Trainer, layout_name: str) -> None:
    sweep = Sweep(trainer, layout_name, 8, random.Random(layout_name))
    sweep.go(print)
    assert len(sweep.died) > 5  # different places
