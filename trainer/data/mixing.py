"""Which source each sample comes from: a fixed cycle of 4,096 slots, repeated for ever.

Slots are shared out in proportion to the weights (largest remainder, every source at least one: a source that was
named is never silently left out), then placed evenly: each slot goes to the source that is furthest behind its share
(smooth weighted round robin). So any stretch of samples is close to the weights, there is no random draw, and any
sample number can be located without history. A share is exact to one slot, 1/4,096.

FINAL: tests/golden/mixing_v1.txt pins the values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trainer.core.errors import DataError, Problem

MIXING_VERSION = 1
CYCLE = 4096


class Mixture:
    """Deterministic schedule of samples over sources.

    Raises DataError for a weight that isn't finite and positive, or for more than 4,096 sources.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        problems = [
            Problem(f"data.train.{i}.weight", weight, "must be a finite number above 0")
            for i, weight in enumerate(weights)
            if not (math.isfinite(weight) and weight > 0)
        ]
        if not 1 <= len(weights) <= CYCLE:
            problems.append(Problem("data.train", f"{len(weights)} sources", f"must name 1 to {CYCLE} sources"))
        if problems:
            raise DataError(problems, title="mixture")
        self.counts = _share_slots(weights)
        """Slots of each source in a cycle; they add up to 4,096."""
        self._slot_source, self._slot_index = _place_slots(self.counts)
        self._counts = np.array(self.counts, dtype=np.int64)

    @property
    def proportions(self) -> tuple[float, ...]:
        """The share of samples each source really gets."""
        return tuple(count / CYCLE for count in self.counts)

    def locate(self, sample_number: int) -> tuple[int, int]:
        """Return (source, number of earlier samples from that source) of a global sample number."""
        if sample_number < 0:
            raise ValueError(f"sample number {sample_number} is below 0")
        cycle, slot = divmod(sample_number, CYCLE)
        source = int(self._slot_source[slot])
        return source, cycle * self.counts[source] + int(self._slot_index[slot])

    def locate_many(self, sample_numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return ``locate`` of every element: two int64 arrays of the same shape."""
        if sample_numbers.size and int(sample_numbers.min()) < 0:
            raise ValueError("a sample number is below 0")
        cycles, slots = np.divmod(sample_numbers.astype(np.int64), CYCLE)
        sources = self._slot_source[slots]
        return sources, cycles * self._counts[sources] + self._slot_index[slots]


def _share_slots(weights: Sequence[float]) -> tuple[int, ...]:
    """Split the cycle by largest remainder, at least one slot each. Exact: no rounding of the machine's."""
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    spare = CYCLE - len(weights)
    # One slot each first, the rest in proportion to what is missing to a fair share.
    missing = [max(weight * CYCLE / total - 1, Fraction(0)) for weight in exact]
    wanted = [1 + share * spare / (sum(missing) or Fraction(1)) for share in missing]
    counts = [math.floor(share) for share in wanted]
    by_remainder = sorted(range(len(counts)), key=lambda i: (counts[i] - wanted[i], i))
    for i in range(CYCLE - sum(counts)):
        counts[by_remainder[i % len(counts)]] += 1
    return tuple(counts)


@lru_cache(maxsize=8)
def _place_slots(counts: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (source of each slot, earlier slots of that source in the cycle), int64 [4096] each."""
    shares = np.array(counts, dtype=np.int64)
    behind = np.zeros_like(shares)
    used = np.zeros_like(shares)
    sources, indices = np.empty(CYCLE, dtype=np.int64), np.empty(CYCLE, dtype=np.int64)
    for slot in range(CYCLE):
        behind += shares
        source = int(np.argmax(behind))  # the first of equals: the order of the recipe
        behind[source] -= CYCLE
        sources[slot], indices[slot] = source, used[source]
        used[source] += 1
    for array in (sources, indices):
        array.flags.writeable = False  # shared by every Mixture of the same counts
    return sources, indices
