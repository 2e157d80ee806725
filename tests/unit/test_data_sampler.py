"""From a global sample number to a sample: epochs, mixture, extension, fingerprint."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from trainer.core.errors import DataError
from trainer.data.packing import sample_span, samples_in
from trainer.data.sampler import Sampler

pytestmark = pytest.mark.fast


@dataclass(frozen=True)
class Tokens:
    """Just enough of token shards."""

    num_tokens: int
    fingerprint: str = "aa"


@pytest.mark.parametrize(
    ("tokens", "length", "expected"), [(0, 4, 0), (4, 4, 0), (5, 4, 1), (8, 4, 1), (9, 4, 2), (3, 1, 2)]
)
def test_packing_shares_one_token(tokens: int, length: int, expected: int) -> None:
    assert samples_in(tokens, length) == expected
    for sample in range(expected):
        start, count = sample_span(sample, length)
        assert (start, count) == (sample * length, length + 1)
        assert start + count <= tokens


def test_every_epoch_visits_every_sample_once_in_its_own_order() -> None:
    sampler = Sampler([Tokens(401)], [1.0], seed=3, sequence_length=4)
    assert sampler.samples_per_epoch == (100,)
    epochs = [[sampler.locate(epoch * 100 + i)[1] for i in range(100)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sorted(epochs[0])


def test_many_equal_one_by_one_across_sources_and_epochs() -> None:
    sampler = Sampler([Tokens(401), Tokens(90, "bb"), Tokens(1000, "cc")], [2.0, 1.0, 0.5], seed=0, sequence_length=4)
    numbers = np.arange(3000)
    sources, samples = sampler.locate_many(numbers)
    assert list(zip(sources.tolist(), samples.tolist(), strict=True)) == [sampler.locate(i) for i in range(3000)]
    assert sampler.locate_many(np.array([], dtype=np.int64))[0].size == 0


def test_a_small_source_is_repeated_evenly() -> None:
    sampler = Sampler([Tokens(4001), Tokens(41, "bb")], [1.0, 1.0], seed=0, sequence_length=4)
    sources, samples = sampler.locate_many(np.arange(2000))
    assert np.bincount(samples[sources == 1]).tolist() == [100] * 10


def test_order_depends_on_seed_and_content_but_not_on_place() -> None:
    def order(fingerprint: str, seed: int) -> list[int]:
        return [Sampler([Tokens(4001, fingerprint)], [1], seed, 4).locate(i)[1] for i in range(50)]

    assert order("aa", 0) == order("aa", 0)
    assert order("aa", 0) != order("aa", 1)
    assert order("aa", 0) != order("ab", 0)


def test_asking_for_more_never_reorders_what_was_seen() -> None:
    """Nothing about the length of the run goes in; Megatron reorders when a run crosses an epoch."""
    seen = [Sampler([Tokens(401)], [1], 0, 4).locate(i) for i in range(150)]
    longer = Sampler([Tokens(401)], [1], 0, 4)
    assert [longer.locate(i) for i in (10**9, *range(150))][1:] == seen


def test_fingerprint_changes_with_what_decides_the_tokens() -> None:
    base = ([Tokens(401), Tokens(400, "bb")], [1.0, 3.0], 0, 4)
    fingerprint = Sampler(*base).fingerprint
    assert Sampler(base[0], [2.0, 6.0], 0, 4).fingerprint == fingerprint
    changed = [
        Sampler(base[0][::-1], [1.0, 3.0], 0, 4),
        Sampler(base[0], [1.0, 2.0], 0, 4),
        Sampler(base[0], [1.0, 3.0], 0, 5),
        Sampler([Tokens(401, "x"), base[0][1]], [1.0, 3.0], 0, 4),
    ]
    assert len({fingerprint, *(sampler.fingerprint for sampler in changed)}) == 5


def test_all_sources_that_are_too_short_are_named() -> None:
    with pytest.raises(DataError) as caught:
        Sampler([Tokens(4), Tokens(401), Tokens(2)], [1, 1, 1], 0, 4)
    assert [problem.key for problem in caught.value.problems] == ["data.train.0", "data.train.2"]
