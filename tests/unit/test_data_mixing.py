"""Mixture schedule: exact shares, spread evenly, located without history, weights that change on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.core.errors import DataError
from trainer.data.mixing import CIRCLE, MIXING_VERSION, Mixture, Stage, count_below, reverse_bits

pytestmark = pytest.mark.fast
GOLDEN = Path(__file__).parents[1] / "golden" / "mixing_v2.txt"
weights_strategy = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9)


def mixture(*weights: float) -> Mixture:
    return Mixture([Stage(0, weights)])


def test_golden_values() -> None:
    """These may never change: a run that resumes under a newer version must see the same order."""
    assert MIXING_VERSION == 2
    lines = [line for line in GOLDEN.read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) >= 6
    for line in lines:
        weights, slots, start, sources, indices = (part.split() for part in line.split("|"))
        found = mixture(*(float(weight) for weight in weights))
        assert found.slots(0) == tuple(int(count) for count in slots)
        numbers = int(start[0]) + np.arange(len(sources))
        located = found.locate_many(numbers)
        assert located[0].tolist() == [int(source) for source in sources]
        assert located[1].tolist() == [int(index) for index in indices]


@settings(max_examples=25, deadline=None)
@given(weights=weights_strategy)
def test_shares_are_exact_to_a_slot_and_nobody_is_left_out(weights: list[float]) -> None:
    slots = mixture(*weights).slots(0)
    assert sum(slots) == CIRCLE
    assert min(slots) >= 1
    for share, weight in zip(slots, weights, strict=True):
        assert abs(share - weight / sum(weights) * CIRCLE) < len(weights) + 1


@settings(max_examples=15, deadline=None)
@given(weights=weights_strategy, start=st.integers(0, 2**50))
def test_each_source_counts_on_without_a_gap(weights: list[float], start: int) -> None:
    found = mixture(*weights)
    sources, indices = found.locate_many(np.arange(start, start + 3000))
    before = found.counts_before(start)
    assert sum(before) == start
    for source in range(len(weights)):
        of_source = indices[sources == source]
        assert of_source.tolist() == list(range(before[source], before[source] + of_source.size))
    for offset in (0, 1, 2999):
        assert found.locate(start + offset) == (sources[offset], indices[offset])


@given(length=st.integers(0, 5000), bound=st.integers(0, CIRCLE))
def test_counting_equals_counting_one_by_one(length: int, bound: int) -> None:
    reversed_numbers = np.array([int(f"{k:032b}"[::-1], 2) for k in range(length)])
    assert count_below(np.array([length]), np.array([bound])).tolist() == [int((reversed_numbers < bound).sum())]
    assert reverse_bits(np.arange(length)).tolist() == reversed_numbers.tolist()


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2], [0.9, 0.1], [1.0] * 7, [0.7, 0.2, 0.05, 0.05], [1.0, 1e-4]])
def test_any_prefix_is_close_to_the_weights(weights: list[float]) -> None:
    """Van der Corput's sequence leaves an interval's share by at most log2(n) / 3 + 1 at each of its two ends."""
    count = 1 << 17
    sources, _ = mixture(*weights).locate_many(np.arange(count))
    length = np.arange(1, count + 1)
    for source, weight in enumerate(weights):
        drift = np.cumsum(sources == source) - length * weight / sum(weights)
        assert (np.abs(drift) <= 2 * (np.log2(length) / 3 + 1)).all()


def test_scale_of_the_weights_does_not_matter() -> None:
    assert (
        mixture(1, 3).slots(0) == mixture(0.5, 1.5).slots(0) == mixture(1e-200, 3e-200).slots(0) == (2**30, 3 * 2**30)
    )


def test_five_thousand_sources() -> None:
    weights = np.random.default_rng(0).lognormal(0, 2, 5000)
    found = mixture(*weights.tolist())
    counts = np.array(found.counts_before(10_000_000))
    assert np.abs(counts - weights / weights.sum() * 1e7).max() < 20


def test_stages_change_the_weights_and_sources_go_on_where_they_were() -> None:
    found = Mixture([Stage(0, (3.0, 1.0, 0.0)), Stage(1000, (0.0, 1.0, 1.0)), Stage(1500, (1.0, 1.0, 1.0))])
    sources, indices = found.locate_many(np.arange(4000))
    assert np.bincount(sources[:1000], minlength=3).tolist() == [750, 250, 0]
    assert np.bincount(sources[1000:1500], minlength=3).tolist() == [0, 250, 250]
    for source in range(3):
        assert indices[sources == source].tolist() == list(range(int((sources == source).sum())))
    assert found.counts_before(4000) == tuple(np.bincount(sources, minlength=3).tolist())


def test_a_later_stage_leaves_the_past_alone() -> None:
    early = Mixture([Stage(0, (3.0, 1.0))]).locate_many(np.arange(1000))
    late = Mixture([Stage(0, (3.0, 1.0)), Stage(1000, (1.0, 1.0))]).locate_many(np.arange(1000))
    assert [array.tolist() for array in early] == [array.tolist() for array in late]


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [-1.0], [float("nan")], [float("inf")], [1.0] * 65537])
def test_weights_that_cannot_be_used(weights: list[float]) -> None:
    with pytest.raises(DataError, match=r"data\.train"):
        mixture(*weights)


def test_stages_that_do_not_follow_are_refused() -> None:
    with pytest.raises(DataError, match=r"data\.stages\.1\.after_tokens"):
        Mixture([Stage(0, (1.0,)), Stage(10, (1.0,)), Stage(10, (1.0,))])
