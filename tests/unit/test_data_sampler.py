"""From a global sample number to a sample: epochs, mixture, budgets, stages, extension, fingerprint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from trainer.config.data import DataConfig
from trainer.core.errors import DataError
from trainer.data.packing import samples_in
from trainer.data.sampler import Sampler

pytestmark = pytest.mark.fast
S = 4


def sampler(
    counts: Sequence[int],
    train: Sequence[dict[str, Any]] | None = None,
    seed: int = 0,
    names: Sequence[str] = "abcdefgh",
    **data: Any,
) -> Sampler:
    """A sampler over sources of so many samples; ``names`` stand for their contents."""
    given = train or [{}] * len(counts)
    sources = [{"path": f"p{i}", "name": f"s{i}", **source} for i, source in enumerate(given)]
    config = DataConfig.model_validate({"train": sources, "sequence_length": S, **data})
    return Sampler(config, seed, names[: len(counts)], counts)


@pytest.mark.parametrize(
    ("tokens", "length", "expected"), [(0, 4, 0), (4, 4, 0), (5, 4, 1), (8, 4, 1), (9, 4, 2), (3, 1, 2)]
)
def test_packing_shares_one_token(tokens: int, length: int, expected: int) -> None:
    assert samples_in(tokens, length) == expected


def test_every_epoch_visits_every_sample_once_in_its_own_order() -> None:
    found = sampler([100], seed=3)
    epochs = [[found.locate(epoch * 100 + i) for i in range(100)] for epoch in range(3)]
    assert all(sorted(sample for _, sample, _ in epoch) == list(range(100)) for epoch in epochs)
    assert [{number for _, _, number in epoch} for epoch in epochs] == [{0}, {1}, {2}]
    orders = [[sample for _, sample, _ in epoch] for epoch in epochs]
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_many_equal_one_by_one_across_sources_and_epochs() -> None:
    found = sampler([100, 22, 250], [{"weight": 2}, {"weight": 1}, {"weight": 0.5}])
    located = found.locate_many(np.arange(3000))
    assert list(zip(*(array.tolist() for array in located), strict=True)) == [found.locate(i) for i in range(3000)]
    assert found.locate_many(np.array([], dtype=np.int64))[0].size == 0


def test_a_small_source_is_repeated_evenly() -> None:
    sources, samples, _ = sampler([1000, 10]).locate_many(np.arange(2000))
    assert np.bincount(samples[sources == 1]).tolist() == [100] * 10


def test_order_depends_on_seed_and_content_but_not_on_place() -> None:
    def order(name: str, seed: int) -> list[int]:
        return [sampler([1000], seed=seed, names=[name]).locate(i)[1] for i in range(50)]

    assert order("a", 0) == order("a", 0)
    assert order("a", 0) != order("a", 1)
    assert order("a", 0) != order("b", 0)


def test_asking_for_more_never_reorders_what_was_seen() -> None:
    """16,000 samples asked for instead of 15,000, over an epoch of 15,600: Megatron's order has no sample in common."""
    numbers = np.arange(16000)
    longer = sampler([15600]).locate_many(numbers)[1]
    shorter = sampler([15600]).locate_many(numbers[:15000])[1]
    assert longer[:15000].tolist() == shorter.tolist()
    assert sorted(longer[:15600].tolist()) == list(range(15600))


def test_budgets_in_epochs_and_tokens_are_kept() -> None:
    found = sampler([1000, 50, 400], [{"epochs": 1}, {"epochs": 4}, {"tokens": 100 * S}])
    assert found.budget == 1300
    counts = found.counts_before(1300)
    assert [abs(a - b) for a, b in zip(counts, (1000, 200, 100), strict=True)] <= [3, 3, 3]
    assert sampler([1000]).budget is None


def test_stages_begin_at_their_tokens_and_the_past_stays() -> None:
    base = sampler([1000, 1000])
    stages = [{"after_tokens": 800 * S - 1, "weights": {"s1": 1.0}}]
    staged = sampler([1000, 1000], stages=stages)
    numbers = np.arange(1200)
    before, after = base.locate_many(numbers), staged.locate_many(numbers)
    for one, other in zip(before, after, strict=True):
        assert one[:800].tolist() == other[:800].tolist()
    assert set(after[0][800:].tolist()) == {1}
    # A stage ahead may be added or changed; once it has begun, it is part of what was trained on.
    assert staged.fingerprint(800) == base.fingerprint(800)
    assert staged.fingerprint(801) != base.fingerprint(801)


def test_a_source_for_a_later_stage_may_be_added() -> None:
    base = sampler([1000])
    stages = [{"after_tokens": 400, "weights": {"s0": 1.0, "s1": 1.0}}]
    more = sampler([1000, 500], [{"weight": 1}, {"weight": 0}], stages=stages)
    assert more.fingerprint(100) == base.fingerprint(100)
    assert more.fingerprint(101) != base.fingerprint(101)


def test_fingerprint_changes_with_what_decides_the_tokens() -> None:
    fingerprint = sampler([100, 99], [{"weight": 1}, {"weight": 3}]).fingerprint(0)
    assert sampler([100, 99], [{"weight": 2}, {"weight": 6}]).fingerprint(0) == fingerprint
    changed = [
        sampler([99, 100], [{"weight": 1}, {"weight": 3}], names="ba"),
        sampler([100, 99], [{"weight": 1}, {"weight": 2}]),
        sampler([100, 99], [{"weight": 1}, {"weight": 3}], sequence_length=5),
        sampler([100, 99], [{"weight": 1}, {"weight": 3}], packing="best_fit"),
        sampler([100, 99], [{"weight": 1}, {"weight": 3}], names="xb"),
    ]
    assert len({fingerprint, *(other.fingerprint(0) for other in changed)}) == 6


def test_all_sources_that_are_too_short_are_named() -> None:
    with pytest.raises(DataError) as caught:
        sampler([0, 100, 0])
    assert [problem.key for problem in caught.value.problems] == ["data.train.0.path", "data.train.2.path"]
