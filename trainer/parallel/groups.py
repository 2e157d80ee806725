"""Process groups along the axes of the mesh."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from torch import distributed

from trainer.parallel.topology import Topology


def axis_group(mesh: Topology, axis: str) -> distributed.ProcessGroup:
    """Return the group of ranks that differ from this one along ``axis`` (tensor, sequence, data) only.

    Collective: every rank makes every group, in the same order.
    """
    mine: distributed.ProcessGroup | None = None
    rank = distributed.get_rank()
    for first in range(mesh.world_size):
        place = mesh.place(first)
        if getattr(place, axis):
            continue
        ranks = [mesh.rank(replace(place, **{axis: number})) for number in range(getattr(mesh, axis))]
        group = distributed.new_group(ranks)
        if rank in ranks:
            mine = cast("distributed.ProcessGroup", group)
    assert mine is not None
    return mine
