"""A rank that is slower than the others is named, once, when it stays so."""

from __future__ import annotations

import pytest
import torch

from trainer.config.watchdog import WatchdogConfig
from trainer.training.stragglers import Comparison, Stragglers

pytestmark = pytest.mark.fast


@pytest.fixture
def said() -> list[str]:
    return []


def compare(said: list[str], *rounds: list[float]) -> Stragglers:
    made = Stragglers(WatchdogConfig(), torch.device("cpu"), ["a", "a", "b", "b"], said.append)
    for seconds in rounds:
        made._judge(seconds)
    return made


def test_a_rank_that_stays_slow_is_named_with_its_host(said: list[str]) -> None:
    made = compare(said, *[[1.0, 1.1, 1.0, 1.5]] * 5)
    assert made.newest == Comparison(1.5, 1.0, 3)
    assert said == ["warning: rank 3 on b is slow: its own work takes 1.5 s a step, that of most ranks 1 s"]


def test_others_are_not(said: list[str]) -> None:
    slow, even = [1.0, 1.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.2]
    compare(said, slow, slow, even, slow, slow)  # not three in a row
    compare(said, slow, slow, [1.0, 2.0, 1.0, 1.0], slow)  # another rank in between
    compare(said, *[[0.001, 0.001, 0.001, 0.005]] * 5)  # milliseconds are noise
    assert said == []


def test_one_rank_has_nobody_to_be_compared_with(said: list[str]) -> None:
    made = Stragglers(WatchdogConfig(straggler_steps=1), torch.device("cpu"), ["a"], said.append)
    made.observe(1.0)
    assert made.newest is None
