"""Which rank is which: pure arithmetic between ranks and their places in the mesh."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """One rank's coordinates."""

    stage: int
    """Pipeline stage."""
    data: int
    """Which of the replicas that see different sequences."""


@dataclass(frozen=True)
class Topology:
    """Degrees of the mesh. Ranks of one stage are neighbours: DeepSpeed's ``PipeDataParallelTopology``."""

    pipeline: int
    data: int

    @property
    def world_size(self) -> int:
        """Ranks of the mesh."""
        return self.pipeline * self.data

    def place(self, rank: int) -> Place:
        """Return the coordinates of a rank."""
        return Place(rank // self.data, rank % self.data)

    def rank(self, place: Place) -> int:
        """Return the rank at some coordinates."""
        return place.stage * self.data + place.data
