"""What ranks tell each other around a checkpoint; one process alone agrees with itself."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any, TypeVar, cast

from torch import distributed

T = TypeVar("T")
TIMEOUT = datetime.timedelta(hours=2)
"""One rank may hash or write hundreds of gigabytes while the others wait. That a host is gone is found by training."""


class Ranks:
    """The group of all ranks, as the checkpoint code sees it."""

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        self.rank = distributed.get_rank()
        self.world_size = distributed.get_world_size()
        self._group = group

    @classmethod
    def apart(cls) -> Ranks:
        """Return the same ranks over connections of their own, which wait long, for a thread beside too. Collective."""
        return cls(cast("distributed.ProcessGroup", distributed.new_group(backend="gloo", timeout=TIMEOUT)))

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, on every rank, in rank order."""
        values: list[T | None] = [None] * self.world_size
        distributed.all_gather_object(values, value, group=self._group)
        return values  # type: ignore[return-value]

    def to_first(self, value: T) -> list[T] | None:
        """Return every rank's value on rank 0, None on the others."""
        values: list[Any] = [None] * self.world_size
        distributed.gather_object(value, values if self.rank == 0 else None, dst=0, group=self._group)
        return values if self.rank == 0 else None

    def from_first(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        box = [value]
        distributed.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def deal(self, values: Sequence[T] | None) -> T:
        """Return this rank's of the values that rank 0 gives, one a rank."""
        box: list[T | None] = [None]
        distributed.scatter_object_list(box, list(values) if values else None, src=0, group=self._group)
        return box[0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Return when every rank is here."""
        distributed.barrier(group=self._group)
