"""Look through the elements of a checkpoint in bounded memory, whatever its layout: for NaN and Inf."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from trainer.checkpoint import layout
from trainer.checkpoint.reader import CheckpointReader

CHUNK_ELEMENTS = 1 << 22
"""Read at a time: 16 MiB of float32."""


@dataclass(frozen=True)
class NotFinite:
    """A state with elements that are no numbers."""

    name: str
    key: str
    num_nan: int
    num_inf: int
    first: tuple[int, ...]
    """Index of the first of them."""

    def __str__(self) -> str:
        index = ", ".join(map(str, self.first))
        return f"{self.name} {self.key}: {self.num_nan:,} NaN, {self.num_inf:,} Inf, the first at [{index}]"


def state_dtypes(directory: Path) -> dict[str, dict[str, str]]:
    """Return the dtype of every state by tensor and state key, as the manifest says."""
    manifest = layout.read_manifest(directory) or {"tensors": {}}
    return {
        name: {key: state["dtype"] for key, state in entry["states"].items()}
        for name, entry in manifest["tensors"].items()
    }


def chunk_ranges(count: int) -> Iterator[tuple[int, int]]:
    """Yield (start, count) of consecutive chunks of a flattened tensor."""
    for start in range(0, count, CHUNK_ELEMENTS):
        yield start, min(CHUNK_ELEMENTS, count - start)


def not_finite(directory: Path) -> list[NotFinite]:
    """Return every state of a sound checkpoint that holds NaN or Inf. Raises CheckpointError."""
    reader = CheckpointReader(directory)
    found: list[NotFinite] = []
    for name, states in state_dtypes(directory).items():
        shape = reader.shape(name)
        for key in states:
            num_nan = num_inf = 0
            first: int | None = None
            for start, count in chunk_ranges(math.prod(shape)):
                chunk = reader.read(name, key, start, count)
                if not chunk.is_floating_point():
                    break
                bad = ~torch.isfinite(chunk)
                num_bad = int(bad.sum())
                if num_bad:
                    here = int(torch.isnan(chunk).sum())
                    num_nan, num_inf = num_nan + here, num_inf + num_bad - here
                    first = start + int(bad.to(torch.uint8).argmax()) if first is None else first
            if first is not None:
                index = tuple(int(place) for place in np.unravel_index(first, shape)) if shape else ()
                found.append(NotFinite(name, key, num_nan, num_inf, index))
    return found
