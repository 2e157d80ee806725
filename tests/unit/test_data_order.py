"""The order of samples: a permutation, the same for ever."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.order import MAX_SIZE, ORDER_VERSION, epoch_key, permute, permute_many

pytestmark = pytest.mark.fast
GOLDEN = Path(__file__).parents[1] / "golden" / "order_v1.txt"


def test_golden_values() -> None:
    """These may never change: a run that resumes under a newer version must see the same order."""
    assert ORDER_VERSION == 1
    lines = [line.split() for line in GOLDEN.read_text().splitlines() if line and not line.startswith("#")]
    keys = [fields for fields in lines if fields[0] == "key"]
    values = [fields for fields in lines if fields[0] == "permute"]
    assert len(keys) >= 4
    assert len(values) >= 40
    for _, seed, fingerprint, epoch, key in keys:
        assert epoch_key(int(seed), 1, fingerprint, int(epoch)) == int(key)
    for _, index, n, key, result in values:
        assert permute(int(index), int(n), int(key)) == int(result)


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 1000, 4096, 4097, 65537])
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_is_a_bijection(n: int, key: int) -> None:
    assert sorted(permute_many(np.arange(n), n, key).tolist()) == list(range(n))


@given(n=st.integers(1, MAX_SIZE), key=st.integers(0, 2**64 - 1), data=st.data())
def test_scalar_and_vector_agree_at_any_size(n: int, key: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=8, unique=True))
    many = permute_many(np.array(indices), n, key).tolist()
    assert many == [permute(index, n, key) for index in indices]
    assert len(set(many)) == len(indices)
    assert all(0 <= value < n for value in many)


def inverse(value: int, n: int, key: int) -> int:
    """Undo ``permute``: an independent walk backwards through the Feistel rounds."""
    bits = (n - 1).bit_length()
    low_bits = bits // 2
    high_mask, low_mask = (1 << (bits - low_bits)) - 1, (1 << low_bits) - 1
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    keys = [mix((key + (i + 1) * 0x9E3779B97F4A7C15) & mask) for i in range(12)]
    while True:
        high, low = value >> low_bits, value & low_mask
        for i in range(10, -1, -2):
            low ^= mix(high ^ keys[i + 1]) & low_mask
            high ^= mix(low ^ keys[i]) & high_mask
        value = (high << low_bits) | low
        if value < n:
            return value


@given(bits=st.integers(1, 48), below=st.integers(0, 2**47), key=st.integers(0, 2**64 - 1), data=st.data())
def test_every_value_comes_from_exactly_one_index(bits: int, below: int, key: int, data: st.DataObject) -> None:
    n = max(1, 2**bits - below % 2 ** (bits - 1))
    value = data.draw(st.integers(0, n - 1))
    assert permute(inverse(value, n, key), n, key) == value
    assert inverse(permute(value, n, key), n, key) == value


def test_shape_is_kept_and_input_untouched() -> None:
    indices = np.arange(12).reshape(3, 4)
    result = permute_many(indices, 12, 5)
    assert result.shape == (3, 4)
    assert indices.ravel().tolist() == list(range(12))
    assert permute_many(np.array([], dtype=np.int64), 12, 5).size == 0


@pytest.mark.parametrize(("index", "n"), [(0, 0), (5, 5), (-1, 5), (0, MAX_SIZE + 1)])
def test_what_is_no_index_is_refused(index: int, n: int) -> None:
    with pytest.raises(ValueError, match="range"):
        permute(index, n, 1)
    with pytest.raises(ValueError, match="range"):
        permute_many(np.array([index]), n, 1)


def test_key_depends_on_everything() -> None:
    keys = {epoch_key(s, v, f, e) for s in (0, 1, 11) for v in (1, 2) for f in ("a", "b") for e in (0, 1, 11)}
    assert len(keys) == 3 * 2 * 2 * 3
    assert all(0 <= key < 2**64 for key in keys)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 16, 37])
def test_every_position_is_equally_likely(n: int) -> None:
    """Chi-square of where each index lands over 1,000 keys; 5 standard deviations above its mean is out."""
    keys = 1000
    landed = np.zeros((n, n))
    for epoch in range(keys):
        landed[np.arange(n), permute_many(np.arange(n), n, epoch_key(0, 1, "x", epoch))] += 1
    chi_square = ((landed - keys / n) ** 2 / (keys / n)).sum()
    freedom = (n - 1) ** 2
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_all_orders_of_four_appear_equally_often() -> None:
    orders: dict[tuple[int, ...], int] = {}
    for epoch in range(4800):
        order = tuple(permute_many(np.arange(4), 4, epoch_key(0, 1, "y", epoch)).tolist())
        orders[order] = orders.get(order, 0) + 1
    assert len(orders) == 24
    assert sum((count - 200) ** 2 / 200 for count in orders.values()) < 23 + 5 * np.sqrt(46)


@pytest.mark.parametrize("n", [1000, 65536, 100_003])
def test_neighbours_are_unrelated(n: int) -> None:
    limit = 5 / np.sqrt(n)
    for epoch in range(3):
        order = permute_many(np.arange(n), n, epoch_key(7, 1, "z", epoch)).astype(float)
        following = permute_many(np.arange(n), n, epoch_key(7, 1, "z", epoch + 1)).astype(float)
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < limit
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < limit
        assert abs(np.corrcoef(order, following)[0, 1]) < limit
        # In a random order about one pair keeps its neighbour on each side, and few stay where they are.
        assert (np.abs(np.diff(order)) == 1).sum() < 15
        assert (order == np.arange(n)).sum() < 10
