"""The short version of kill_sweep.py: a run of ZeRO-2 and one in stages, killed 15 times at every point of a save."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from forked_runs import Trainer
from kill_sweep import LAYOUTS, POINTS, Attempt, Sweep


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    with Trainer(tmp_path_factory.mktemp("kills")) as made:
        yield made


def attempts(number: int) -> list[Attempt]:
    """Every second point of the save protocol from ``number``, each by its hardest death, and two random moments."""
    chosen = [
        Attempt(only_asynchronous or place % 4 > 1, point, ranks[place // 2 % len(ranks)], kinds[-1])
        for place, (point, ranks, kinds, only_asynchronous) in enumerate(POINTS)
        if place % 2 == number
    ]
    return [*chosen, Attempt(asynchronous=False), Attempt(asynchronous=True)]


@pytest.mark.parametrize(
    ("number", "layout_name"),
    [pytest.param(number, name, marks=[pytest.mark.sweep] if number else []) for number, name in enumerate(LAYOUTS)],
)
def test_a_run_killed_again_and_again_ends_as_one_left_in_peace(
    trainer: Trainer, number: int, layout_name: str
) -> None:
    Sweep(trainer, layout_name, attempts(number), random.Random(layout_name)).go(print)
