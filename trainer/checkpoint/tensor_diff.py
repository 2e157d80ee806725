"""Compare the tensors of two checkpoints element by element, whatever layouts wrote them, in bounded memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.scan import chunk_ranges, state_dtypes

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TensorDifference:
    """One state of a tensor that is not the same in both."""

    name: str
    key: str
    what: str
    """A sentence; of values it tells how many differ and by how much."""
    num_different: int | None = None
    """Elements whose bits differ (values, where the dtypes are different); None where they can't be compared."""
    max_difference: float | None = None
    """Largest absolute difference; infinite where one of the two is NaN or Inf."""

    def __str__(self) -> str:
        return f"{self.name}{f' {self.key}' if self.key else ''}: {self.what}"


def tensor_differences(a: CheckpointReader, b: CheckpointReader, *, values: bool = True) -> list[TensorDifference]:
    """Return what differs between the tensors of two checkpoints, sorted by name; nothing: they are bit for bit alike.

    Without ``values`` only names, shapes, states and dtypes are compared. Raises CheckpointError if one is damaged.
    """
    in_a, in_b = state_dtypes(a.directory), state_dtypes(b.directory)
    found: list[TensorDifference] = []
    for name in sorted(in_a.keys() | in_b.keys()):
        if name not in in_a or name not in in_b:
            found.append(TensorDifference(name, "", f"only in {'A' if name in in_a else 'B'}"))
            continue
        if a.shape(name) != b.shape(name):
            what = f"shape {list(a.shape(name))} -> {list(b.shape(name))}"
            found.append(TensorDifference(name, "", what))
            continue
        for key in sorted(in_a[name].keys() | in_b[name].keys()):
            dtypes = in_a[name].get(key), in_b[name].get(key)
            if None in dtypes:
                found.append(TensorDifference(name, key, f"only in {'B' if dtypes[0] is None else 'A'}"))
                continue
            prefix = f"dtype {dtypes[0]} -> {dtypes[1]}" if dtypes[0] != dtypes[1] else ""
            difference = _values(a, b, name, key, prefix) if values else None
            if difference is None and prefix:
                difference = TensorDifference(name, key, prefix)
            if difference is not None:
                found.append(difference)
    return found


def _values(a: CheckpointReader, b: CheckpointReader, name: str, key: str, prefix: str) -> TensorDifference | None:
    num_elements, num_different, largest = math.prod(a.shape(name)), 0, 0.0
    for start, count in chunk_ranges(num_elements):
        first, second = a.read(name, key, start, count), b.read(name, key, start, count)
        different = _different(first, second)
        here = int(different.sum())
        if here:
            gap = (first[different].double() - second[different].double()).abs()
            num_different += here
            largest = max(largest, float(torch.where(gap.isnan(), math.inf, gap).max()))
    if not num_different:
        return None
    what = f"{num_different:,} of {num_elements:,} elements differ, by up to {largest:.6g}"
    return TensorDifference(name, key, f"{prefix}, {what}" if prefix else what, num_different, largest)


def _different(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return where bits differ, so that NaN equals itself; of two dtypes, where values do."""
    if first.dtype != second.dtype:
        return first.double() != second.double()
    bits = _BITS[first.dtype.itemsize]
    return first.view(bits) != second.view(bits)
