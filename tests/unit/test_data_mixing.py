"""Mixture schedule: exact shares, spread evenly, located without history."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.core.errors import DataError
from trainer.data.mixing import CYCLE, MIXING_VERSION, Mixture

pytestmark = pytest.mark.fast
GOLDEN = Path(__file__).parents[1] / "golden" / "mixing_v1.txt"
weights_strategy = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9)


def test_golden_values() -> None:
    assert MIXING_VERSION == 1
    lines = [line for line in GOLDEN.read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) >= 4
    for line in lines:
        weights, counts, first = (part.split() for part in line.split("|"))
        mixture = Mixture([float(weight) for weight in weights])
        assert mixture.counts == tuple(int(count) for count in counts)
        assert [mixture.locate(i)[0] for i in range(len(first))] == [int(source) for source in first]


@settings(max_examples=25, deadline=None)
@given(weights=weights_strategy)
def test_shares_are_exact_to_a_slot_and_nobody_is_left_out(weights: list[float]) -> None:
    mixture = Mixture(weights)
    assert sum(mixture.counts) == CYCLE
    assert min(mixture.counts) >= 1
    for share, weight in zip(mixture.counts, weights, strict=True):
        assert abs(share - max(1.0, weight / sum(weights) * CYCLE)) < len(weights) + 1
    sources, _ = mixture.locate_many(np.arange(CYCLE))
    assert np.bincount(sources, minlength=len(weights)).tolist() == list(mixture.counts)


@settings(max_examples=15, deadline=None)
@given(weights=weights_strategy, start=st.integers(0, 2**50))
def test_each_source_counts_on_without_a_gap(weights: list[float], start: int) -> None:
    mixture = Mixture(weights)
    sources, indices = mixture.locate_many(np.arange(start, start + 2 * CYCLE))
    for source in range(len(weights)):
        of_source = indices[sources == source]
        assert (np.diff(of_source) == 1).all()
    for offset in (0, 1, CYCLE, 2 * CYCLE - 1):
        assert mixture.locate(start + offset) == (sources[offset], indices[offset])


def test_every_source_starts_at_its_first_sample() -> None:
    sources, indices = Mixture([5, 3, 1]).locate_many(np.arange(100))
    assert [int(indices[sources == source][0]) for source in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2], [0.9, 0.1], [1.0] * 7, [0.7, 0.2, 0.05, 0.05]])
def test_any_prefix_is_close_to_the_weights(weights: list[float]) -> None:
    sources, _ = Mixture(weights).locate_many(np.arange(3 * CYCLE))
    length = np.arange(1, 3 * CYCLE + 1)
    for source, weight in enumerate(weights):
        drift = np.cumsum(sources == source) - length * weight / sum(weights)
        # Smooth round robin stays within one sample a source; rounding to slots adds one a cycle.
        assert np.abs(drift).max() < len(weights) / 2 + 3


def test_scale_of_the_weights_does_not_matter() -> None:
    assert Mixture([1, 3]).counts == Mixture([0.5, 1.5]).counts == Mixture([1e-200, 3e-200]).counts == (1024, 3072)


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [-1.0], [float("nan")], [float("inf")], [1.0] * (CYCLE + 1)])
def test_weights_that_cannot_be_used(weights: list[float]) -> None:
    with pytest.raises(DataError, match=r"data\.train"):
        Mixture(weights)
