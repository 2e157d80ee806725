"""Which rank is which: pure arithmetic between ranks and their places in the mesh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config.parallel import ParallelConfig


@dataclass(frozen=True)
class Place:
    """One rank's coordinates."""

    stage: int = 0
    """Pipeline stage."""
    data: int = 0
    """Which of the replicas that see different sequences."""
    sequence: int = 0
    """Which part of each sequence."""
    tensor: int = 0
    """Which part of each layer."""


@dataclass(frozen=True)
class Topology:
    """Degrees of the mesh, the outermost axis first.

    Tensor ranks are neighbours, then sequence ranks: they talk most, so a node should hold them. This is the order of
    DeepSpeed's ``PipeModelDataParallelTopology``. Expert ranks are data-parallel ones and are no axis of their own.
    """

    pipeline: int = 1
    data: int = 1
    sequence: int = 1
    tensor: int = 1

    @property
    def world_size(self) -> int:
        """Ranks of the mesh."""
        return self.pipeline * self.data * self.sequence * self.tensor

    def place(self, rank: int) -> Place:
        """Return the coordinates of a rank. Raises ValueError outside of the mesh."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} of {self.world_size}")
        rest, tensor = divmod(rank, self.tensor)
        rest, sequence = divmod(rest, self.sequence)
        stage, data = divmod(rest, self.data)
        return Place(stage, data, sequence, tensor)

    def rank(self, place: Place) -> int:
        """Return the rank at some coordinates."""
        outer = (place.stage * self.data + place.data) * self.sequence + place.sequence
        return outer * self.tensor + place.tensor

    def crosses_nodes(self, axis: str, ranks_per_node: int) -> bool:
        """Return whether ranks that share a group of ``axis`` (tensor or sequence) lie on different nodes."""
        group = self.tensor * (self.sequence if axis == "sequence" else 1)
        return group > 1 and ranks_per_node % group != 0


def mesh_of(parallel: ParallelConfig, world_size: int) -> Topology:
    """Return the mesh of so many ranks; what the degrees leave is data-parallel.

    Raises ValueError if the ranks can't be divided so.
    """
    model = parallel.pipeline * parallel.sequence * parallel.tensor
    if world_size % model:
        raise ValueError(f"{world_size} ranks are no multiple of {model}")
    return Topology(parallel.pipeline, world_size // model, parallel.sequence, parallel.tensor)


def rank_table(topology: Topology, hosts: Sequence[str]) -> list[str]:
    """Return one line a pipeline stage: which ranks hold it, and on which hosts.

    ``hosts`` names the host of every rank.
    """
    per_stage = topology.world_size // topology.pipeline
    return [_where(range(stage * per_stage, (stage + 1) * per_stage), hosts) for stage in range(topology.pipeline)]


def _where(ranks: range, hosts: Sequence[str]) -> str:
    spans: list[tuple[str, int, int]] = []
    for rank in ranks:
        if spans and spans[-1][0] == hosts[rank]:
            spans[-1] = (hosts[rank], spans[-1][1], rank)
        else:
            spans.append((hosts[rank], rank, rank))
    parts = [f"{first}-{last} on {host}" if last > first else f"{first} on {host}" for host, first, last in spans]
    return ("ranks " if len(ranks) > 1 else "rank ") + ", ".join(parts)
