"""Which part of a tensor a rank holds where tensors are divided along a dim."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Cut:
    """Part ``part`` of ``parts`` along ``dim``.

    A dim of several ``chunks`` (query, key and value in one matrix) is cut in each of them.
    """

    dim: int
    part: int
    parts: int
    chunks: int = 1

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """Return the part, a copy. Raises ValueError if the dim can't be divided so."""
        size = whole.shape[self.dim]
        if size % (self.parts * self.chunks):
            raise ValueError(f"a dim of {size} can't be divided into {self.chunks} x {self.parts} parts")
        chosen = self._view(whole).select(self.dim + 1, self.part)
        return chosen.flatten(self.dim, self.dim + 1).clone()

    def put(self, part: torch.Tensor, whole: torch.Tensor) -> None:
        """Write the part where it belongs in ``whole``, which must be contiguous."""
        self._view(whole).select(self.dim + 1, self.part).copy_(part.unflatten(self.dim, (self.chunks, -1)))

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the whole tensor, given that of a part."""
        return (*shape[: self.dim], shape[self.dim] * self.parts, *shape[self.dim + 1 :])

    def part_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a part, given that of the whole tensor."""
        return (*shape[: self.dim], shape[self.dim] // self.parts, *shape[self.dim + 1 :])

    def to_json(self) -> list[int]:
        """Return [dim, part, parts, chunks]."""
        return list(astuple(self))

    def _view(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.unflatten(self.dim, (self.chunks, self.parts, -1))


def cut_of(tensor: torch.Tensor) -> Cut | None:
    """Return how a parameter was cut, None if this rank holds all of it."""
    return getattr(tensor, "cut", None)


def whole_shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of the logical tensor a parameter is, or is part of."""
    cut = cut_of(tensor)
    shape = tuple(getattr(tensor, "ds_shape", tensor.shape))  # ZeRO-3 leaves an empty tensor behind
    return cut.whole_shape(shape) if cut else shape
