"""What ranks tell each other around a checkpoint; one process alone agrees with itself."""

from __future__ import annotations

from typing import TypeVar

from torch import distributed

T = TypeVar("T")


class Ranks:
    """The group of all ranks, as the checkpoint code sees it."""

    def __init__(self) -> None:
        self.rank = distributed.get_rank()
        self.world_size = distributed.get_world_size()

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, on every rank, in rank order."""
        values: list[T | None] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def from_first(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Return when every rank is here."""
        distributed.barrier()
