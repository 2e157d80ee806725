"""Bind this rank to its CPUs and tell torch how many threads that is."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import distributed

from trainer.core.environ import RankEnvironment, threads_are_derived
from trainer.parallel.cpu_binding import Claim, cpus_text, num_cores, numa_node_of, read_node, shares

_SHOWN = 8


def bind(mode: Literal["auto", "none"], ranks: RankEnvironment) -> str | None:
    """Bind this rank as launch.bind says and return a line about the ranks of its node, None where nothing changed.

    Collective; the process group is joined. Data workers and threads that start later inherit the CPUs.
    """
    if mode == "none" or sys.platform != "linux":
        return None
    claim = Claim(frozenset(os.sched_getaffinity(0)), _numa_node())
    everybody: list[tuple[int, int, Claim] | None] = [None] * ranks.world_size
    distributed.all_gather_object(everybody, (ranks.node_rank, ranks.local_rank, claim))
    here = {local: theirs for node, local, theirs in filter(None, everybody) if node == ranks.node_rank}
    claims = [here[local] for local in sorted(here)]
    node = read_node(claim.allowed)
    found = shares(claims, node)
    if found is None:
        return None
    mine = found[sorted(here).index(ranks.local_rank)]
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            os.sched_setaffinity(int(thread.name), mine)
    threads = num_cores(mine, node)
    if threads_are_derived(os.environ):
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    return _line(ranks, found, claims, torch.get_num_threads())


def _numa_node() -> int | None:
    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        address = f"{facts.pci_domain_id:04x}:{facts.pci_bus_id:02x}:{facts.pci_device_id:02x}.0"
    except AttributeError:  # before torch 2.11, and ROCm
        return None
    return numa_node_of(address)


def _line(ranks: RankEnvironment, found: Sequence[frozenset[int]], claims: Sequence[Claim], threads: int) -> str:
    parts = [
        f"{local}: {cpus_text(cpus)}" + (f" (NUMA {claim.numa_node})" if claim.numa_node is not None else "")
        for local, (cpus, claim) in enumerate(zip(found, claims, strict=True))
    ]
    more = ", ..." if len(parts) > _SHOWN else ""
    return f"CPUs of node {ranks.node_rank} by local rank: {', '.join(parts[:_SHOWN])}{more}; {threads} threads a rank"
