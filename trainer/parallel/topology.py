"""Which rank is which: pure arithmetic between ranks and their places in the mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainer.config.parallel import ParallelConfig

MOST_HOSTS = 16
"""Lines of a table of hosts: a thousand would hide what else is printed."""


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


def mesh_table(topology: Topology, hosts: Sequence[str], expert: int = 1) -> list[str]:
    """Return a table of one line a host: its ranks, and where they lie on each axis of a degree above 1.

    ``hosts`` names the host of every rank, ``expert`` is how many neighbouring replicas the experts are spread over.
    """
    axes: list[tuple[str, Callable[[int], int]]] = [
        ("stage", lambda rank: topology.place(rank).stage),
        ("replica", lambda rank: topology.place(rank).data),
        ("sequence", lambda rank: topology.place(rank).sequence),
        ("tensor", lambda rank: topology.place(rank).tensor),
        ("expert", lambda rank: topology.place(rank).data % expert),
    ]
    degrees = (topology.pipeline, topology.data, topology.sequence, topology.tensor, expert)
    shown = [axis for axis, degree in zip(axes, degrees, strict=True) if degree > 1]
    ranks_of: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks_of.setdefault(host, []).append(rank)
    rows = [["host", "ranks", *(name for name, _ in shown)]]
    for host, ranks in list(ranks_of.items())[:MOST_HOSTS]:
        rows.append([host, _span(ranks), *(_span([axis(rank) for rank in ranks]) for _, axis in shown)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    more = len(ranks_of) - MOST_HOSTS
    return lines + ([f"and {more} more hosts"] if more > 0 else [])


def _span(numbers: Sequence[int]) -> str:
    """Return "0-3" for consecutive numbers, "0,2" for others."""
    found = sorted(set(numbers))
    if len(found) > 1 and found[-1] - found[0] == len(found) - 1:
        return f"{found[0]}-{found[-1]}"
    return ",".join(map(str, found))
