"""A checkpoint read by a run that trains parameters which were frozen when it was written."""

from __future__ import annotations

from collections.abc import Collection

import torch

from trainer.engine.base import StateReader
from trainer.parallel.cut import Cut


class NewlyTrainedReader:
    """Implements trainer.engine.base.StateReader: the optimizer state of newly trained parameters is zero."""

    def __init__(self, reader: StateReader, names: Collection[str]) -> None:
        """``names`` are the parameters that ``reader`` holds nothing but the weight of."""
        self._reader = reader
        self._names = names

    def read(self, name: str, key: str, start: int, count: int, cut: Cut | None = None) -> torch.Tensor:
        """Return ``count`` elements from ``start`` of the flattened tensor, or of its part ``cut``, on the CPU."""
        if key != "weight" and name in self._names:
            return torch.zeros(count)
        return self._reader.read(name, key, start, count, cut)
