"""Where the elements of a range lie in the parts that a checkpoint holds: arithmetic only, no files.

A part of a tensor is, in the flattened tensor, runs of equal length at equal distances: so are the parts a checkpoint
holds, and so is the part a rank wants. Both are cut at each other's ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.parallel.cut import Cut

Numbers = NDArray[np.int64]
_AT_A_TIME = 1 << 16
"""Pieces that are worked out at a time, about: bounds the memory of their numbers to a few MB."""


@dataclass(frozen=True)
class Pieces:
    """Contiguous pieces, each array [pieces], in the order of the elements wanted."""

    part: Numbers
    """Number of the held part."""
    start: Numbers
    """First element, in the flattened held part."""
    count: Numbers
    out: Numbers
    """Where the piece goes, counted from the first element wanted."""


@dataclass(frozen=True)
class _Runs:
    """One part of a flattened tensor: run ``j`` of ``length`` elements starts at (``j`` x parts + part) x length."""

    length: int
    part: int
    parts: int

    @classmethod
    def of(cls, shape: tuple[int, ...], cut: Cut | None) -> _Runs:
        if cut is None:
            return cls(math.prod(shape), 0, 1)
        return cls(shape[cut.dim] // (cut.parts * cut.chunks) * math.prod(shape[cut.dim + 1 :]), cut.part, cut.parts)


def fits(shape: tuple[int, ...], cut: Cut) -> bool:
    """Return whether a tensor of ``shape`` can be cut so."""
    sound = cut.parts > 0 and cut.chunks > 0 and 0 <= cut.part < cut.parts and 0 <= cut.dim < len(shape)
    return sound and shape[cut.dim] % (cut.parts * cut.chunks) == 0


def find_pieces(
    shape: tuple[int, ...], wanted: Cut | None, held: Cut | None, start: int, count: int
) -> Iterator[Pieces]:
    """Yield where ``count`` elements from ``start`` of the part ``wanted`` lie in parts like ``held``, some at a time.

    ``held`` is any one of the parts; None: the tensor is held whole. Of ``shape`` [whole tensor], no dim may be 0.
    """
    mine, theirs = _Runs.of(shape, wanted), _Runs.of(shape, held)
    step = _AT_A_TIME * min(mine.length, theirs.length)
    for low in range(start, start + count, step):
        yield _split(*_spans(mine, low, min(step, start + count - low), low - start), theirs)


def split_at(starts: Numbers, start: Numbers, count: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Cut ranges at sorted ``starts``; return (number of the range, of the interval, offset in the range) of pieces.

    A range from below ``starts[0]`` has the interval -1.
    """
    first = np.searchsorted(starts, start, "right") - 1
    last = np.searchsorted(starts, start + count - 1, "right") - 1
    which, nth = _repeated(last - first + 1)
    interval = first[which] + nth
    offset = np.where(nth > 0, starts[interval] - start[which], 0)
    return which, interval, offset


def _spans(runs: _Runs, start: int, count: int, out: int) -> tuple[Numbers, Numbers, Numbers]:
    """Return (start in the whole tensor, count, where they go) of a range of a part."""
    run = np.arange(start // runs.length, -(-(start + count) // runs.length), dtype=np.int64)
    low = np.maximum(run * runs.length, start)
    high = np.minimum((run + 1) * runs.length, start + count)
    shift = (run * (runs.parts - 1) + runs.part) * runs.length
    return low + shift, high - low, low - start + out


def _split(start: Numbers, count: Numbers, out: Numbers, held: _Runs) -> Pieces:
    """Cut ranges of the whole tensor at the ends of the held runs."""
    first, last = start // held.length, (start + count - 1) // held.length
    which, nth = _repeated(last - first + 1)
    run = first[which] + nth
    low = np.maximum(run * held.length, start[which])
    high = np.minimum((run + 1) * held.length, start[which] + count[which])
    inside = run // held.parts * held.length + low - run * held.length
    return Pieces(run % held.parts, inside, high - low, out[which] + low - start[which])


def _repeated(times: Numbers) -> tuple[Numbers, Numbers]:
    """Return each position ``times`` times, and which repetition it is."""
    which = np.repeat(np.arange(len(times), dtype=np.int64), times)
    ends = np.cumsum(times)
    return which, np.arange(len(which), dtype=np.int64) - (ends - times)[which]
