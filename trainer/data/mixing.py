"""Which source each sample comes from: a low-discrepancy sequence, computable at any sample without history.

The sources share a circle of 2^32 slots in proportion to their weights. Sample k of a stage takes slot bitreverse(k)
(van der Corput's sequence in base 2, 1935): any stretch of samples is close to the weights, with no random draw and
nothing stored. How many earlier samples fell to the same source, which is the place in that source's own order, is
counted in closed form.

Weights may change at given sample numbers (stages): every source goes on where it was.

FINAL: tests/golden/mixing_v2.txt pins the values. Another algorithm is another MIXING_VERSION.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from trainer.core.errors import DataError, Problem

MIXING_VERSION = 2
BITS = 32
CIRCLE = 1 << BITS
MAX_SOURCES = 1 << 16


@dataclass(frozen=True)
class Stage:
    """Weights that hold from a sample number on."""

    first_sample: int
    weights: tuple[float, ...]
    """One a source, in the order of the recipe; 0: the source isn't read in this stage."""


class Mixture:
    """Deterministic schedule of samples over sources.

    Raises DataError for weights that aren't finite or are below 0, a stage without any weight, stages that don't
    begin at 0 or don't follow one another, and more than 65,536 sources.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        _refuse_bad(stages)
        self.stages = tuple(stages)
        self.num_sources = len(stages[0].weights)
        self._firsts = np.array([stage.first_sample for stage in stages], dtype=np.int64)
        self._bounds = [_bounds(stage.weights) for stage in stages]
        # Samples of each source before each stage: [stages, sources].
        before = [np.zeros(self.num_sources, dtype=np.int64)]
        for i in range(len(stages) - 1):
            length = int(self._firsts[i + 1] - self._firsts[i])
            before.append(before[i] + self._counts(i, length))
        self._before = np.stack(before)

    def slots(self, stage: int) -> tuple[int, ...]:
        """Return each source's slots of the circle in a stage; they add up to 2^32."""
        return tuple(np.diff(self._bounds[stage]).tolist())

    def stage_of(self, sample_number: int) -> int:
        """Return the index of the stage that a sample belongs to."""
        return int(np.searchsorted(self._firsts, sample_number, side="right")) - 1

    def counts_before(self, sample_number: int) -> tuple[int, ...]:
        """Return how many of the first ``sample_number`` samples came from each source."""
        stage = self.stage_of(sample_number)
        counts = self._before[stage] + self._counts(stage, sample_number - int(self._firsts[stage]))
        return tuple(counts.tolist())

    def locate(self, sample_number: int) -> tuple[int, int]:
        """Return (source, number of earlier samples from that source) of a global sample number."""
        sources, indices = self.locate_many(np.array([sample_number], dtype=np.int64))
        return int(sources[0]), int(indices[0])

    def locate_many(self, sample_numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return ``locate`` of every element of a flat array: two int64 arrays of its length."""
        numbers = np.asarray(sample_numbers, dtype=np.int64)
        if numbers.size and int(numbers.min()) < 0:
            raise ValueError("a sample number is below 0")
        if self.num_sources == 1:
            return np.zeros_like(numbers), numbers.copy()
        sources, indices = np.empty_like(numbers), np.empty_like(numbers)
        stages = np.searchsorted(self._firsts, numbers, side="right") - 1
        present: list[int] = np.unique(stages).tolist()
        for stage in present:
            chosen = stages == stage
            bounds = self._bounds[stage]
            cycles, slots = np.divmod(numbers[chosen] - self._firsts[stage], CIRCLE)
            found = np.searchsorted(bounds, reverse_bits(slots), side="right") - 1
            low, high = bounds[found], bounds[found + 1]
            below = count_below(np.stack([slots, slots]), np.stack([low, high]))
            sources[chosen] = found
            indices[chosen] = self._before[stage][found] + cycles * (high - low) + below[1] - below[0]
        return sources, indices

    def _counts(self, stage: int, length: int) -> NDArray[np.int64]:
        """Return how many of the first ``length`` samples of a stage come from each source, int64 [sources]."""
        bounds = self._bounds[stage]
        cycles, rest = divmod(length, CIRCLE)
        below = count_below(np.full(bounds.size, rest, dtype=np.int64), bounds)
        return cycles * np.diff(bounds) + np.diff(below)


def reverse_bits(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each value below 2^32 with its 32 bits in reverse order."""
    v = values.astype(np.uint64)
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        s, m = np.uint64(shift), np.uint64(mask)
        v = ((v >> s) & m) | ((v & m) << s)
    return v.astype(np.int64)


def count_below(lengths: NDArray[np.int64], bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many k < length have reverse_bits(k) < bound, element by element; both at most 2^32.

    The numbers below ``length`` fall into one block for each of its set bits: higher bits fixed, lower ones free. The
    reversed numbers of a block are an arithmetic progression, whose terms below the bound are counted by a division.
    """
    total = np.where(lengths == CIRCLE, bounds, 0)  # a whole circle: every slot once
    for bit in range(int(lengths.max(initial=0)).bit_length()):
        if bit == BITS:
            break
        fixed = (lengths >> (bit + 1)) << (bit + 1)
        step = BITS - bit
        terms = (bounds - reverse_bits(fixed & (CIRCLE - 1)) + (1 << step) - 1) >> step
        total += np.where((lengths >> bit) & 1, np.clip(terms, 0, 1 << bit), 0)
    return total


def _bounds(weights: Sequence[float]) -> NDArray[np.int64]:
    """Return where each source begins on the circle, int64 [sources + 1].

    Shared out by largest remainder, at least one slot for a weight above 0. Exact fractions: no machine's rounding.
    """
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    wanted = [weight * CIRCLE / total for weight in exact]
    slots = [max(math.floor(share), 1 if share else 0) for share in wanted]
    left = CIRCLE - sum(slots)
    if left < 0:  # sources far below one slot got one: the largest gives it back
        slots[slots.index(max(slots))] += left
    else:
        named = [i for i, share in enumerate(wanted) if share]
        by_remainder = sorted(named, key=lambda i: (slots[i] - wanted[i], i))
        for i in by_remainder[:left]:
            slots[i] += 1
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.array(slots, dtype=np.int64))])


def _refuse_bad(stages: Sequence[Stage]) -> None:
    problems: list[Problem] = []
    if not stages or not 1 <= len(stages[0].weights) <= MAX_SOURCES:
        count = len(stages[0].weights) if stages else 0
        raise DataError(Problem("data.train", f"{count} sources", f"must name 1 to {MAX_SOURCES} sources"), "mixture")
    for i, stage in enumerate(stages):
        where = "data.train" if i == 0 else f"data.stages.{i - 1}"
        problems += [
            Problem(f"{where}: weight of source {j}", weight, "must be a finite number, 0 or above")
            for j, weight in enumerate(stage.weights)
            if not (math.isfinite(weight) and weight >= 0)
        ]
        if not problems and not any(stage.weights):
            problems.append(Problem(where, None, "every weight is 0: there is nothing to read", "give one a weight"))
        if i and stage.first_sample <= stages[i - 1].first_sample:
            rule = "must begin at least one sequence after the stage before"
            problems.append(Problem(f"{where}.after_tokens", None, rule, "raise it, or remove the stage"))
    if stages[0].first_sample != 0:
        raise ValueError("the first stage must begin at sample 0")
    if problems:
        raise DataError(problems, title="mixture")
