"""The order of samples within one epoch: a keyed permutation of range(n), in constant memory.

A Feistel network permutes the smallest power of two >= n; indices that land outside range(n) are encrypted again
until they land inside (cycle-walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), on average
less than twice. Every epoch has its own key, so making a run longer never reorders what it has seen.

FINAL: tests/golden/order_v1.txt pins the values. Another algorithm is another ORDER_VERSION, beside this one.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

ORDER_VERSION = 1
MAX_SIZE = 2**48
ROUNDS = 12

_MASK64 = 2**64 - 1
# splitmix64 (Steele, Lea and Flood, 2014): the increment and the two multipliers of its finaliser.
_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB


def epoch_key(seed: int, version: int, fingerprint: str, epoch: int) -> int:
    """Return the 64-bit key of one epoch of one source.

    ``fingerprint`` is that of the token shards: other data under the same name has another order.
    """
    text = json.dumps(["trainer-order", version, seed, fingerprint, epoch], separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permute(index: int, n: int, key: int) -> int:
    """Return where the permutation of range(n) with ``key`` sends ``index``.

    Raises ValueError for n outside 1..2^48 or an index outside range(n).
    """
    _check_size(n)
    if not 0 <= index < n:
        raise ValueError(f"index {index} is outside range({n})")
    high_bits, low_bits = _halves(n)
    high_mask, low_mask = (1 << high_bits) - 1, (1 << low_bits) - 1
    keys = _round_keys(key)
    value = index
    while True:
        high, low = value >> low_bits, value & low_mask
        for i in range(0, ROUNDS, 2):
            high ^= _mix(low ^ keys[i]) & high_mask
            low ^= _mix(high ^ keys[i + 1]) & low_mask
        value = (high << low_bits) | low
        if value < n:
            return value


def permute_many(indices: NDArray[np.integer[Any]], n: int, key: int) -> NDArray[np.int64]:
    """Return ``permute`` of every element, bit for bit, as a new int64 array of the same shape."""
    _check_size(n)
    values = np.array(indices, dtype=np.int64).ravel()
    if values.size and not (int(values.min()) >= 0 and int(values.max()) < n):
        raise ValueError(f"an index is outside range({n})")
    walking = np.arange(values.size)
    current = values.astype(np.uint64)
    while walking.size:
        current = _encrypt_many(current, n, key)
        inside = current < n
        values[walking[inside]] = current[inside].astype(np.int64)
        walking, current = walking[~inside], current[~inside]
    return values.reshape(np.shape(indices))


def _encrypt_many(values: NDArray[np.uint64], n: int, key: int) -> NDArray[np.uint64]:
    high_bits, low_bits = (np.uint64(bits) for bits in _halves(n))
    one = np.uint64(1)
    high_mask, low_mask = (one << high_bits) - one, (one << low_bits) - one
    keys = [np.uint64(k) for k in _round_keys(key)]
    high, low = values >> low_bits, values & low_mask
    for i in range(0, ROUNDS, 2):
        high = high ^ (_mix_many(low ^ keys[i]) & high_mask)
        low = low ^ (_mix_many(high ^ keys[i + 1]) & low_mask)
    return (high << low_bits) | low


def _check_size(n: int) -> None:
    if not 1 <= n <= MAX_SIZE:
        raise ValueError(f"can't permute range({n}): the size must be between 1 and 2^48")


def _halves(n: int) -> tuple[int, int]:
    """Return how many bits the two parts of an index have; the parts needn't be equal."""
    bits = (n - 1).bit_length()
    return bits - bits // 2, bits // 2


@lru_cache(maxsize=64)
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(_mix((key + (i + 1) * _INCREMENT) & _MASK64) for i in range(ROUNDS))


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * _MULTIPLY_1) & _MASK64
    value = ((value ^ (value >> 27)) * _MULTIPLY_2) & _MASK64
    return value ^ (value >> 31)


def _mix_many(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MULTIPLY_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MULTIPLY_2)
    return values ^ (values >> np.uint64(31))
