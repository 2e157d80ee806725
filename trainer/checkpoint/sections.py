"""Which rank writes where: a file a rank, or one a node, so that thousands of ranks leave no thousands of files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainer.checkpoint.shard_file import ALIGNMENT, header_of, padded
from trainer.parallel.cut import Cut

RANKS_WITH_FILES_OF_THEIR_OWN = 64
"""Up to so many ranks ``files: auto`` gives each its own: a shared file costs locks on many file systems."""
Slice = tuple[str, str, str, tuple[int, ...], int, int, Cut | None]
"""(name, key, dtype, shape, start, count, cut)"""


@dataclass(frozen=True)
class Holding:
    """What a rank has to write; the same at every save."""

    host: str
    places: tuple[tuple[str, str, int], ...]
    """(key, safetensors dtype, elements) in the order they are written."""
    num_bytes: int
    slices: tuple[Slice, ...]
    free_memory_bytes: int
    """Of its host."""
    buffered: bool
    """Whether it would keep a copy in memory."""


@dataclass(frozen=True)
class Section:
    """Where a rank writes."""

    file: str
    start: int
    """First byte in the file."""
    header: bytes
    """Of the whole file; empty but on the rank whose section is the first."""
    padding: int
    """Bytes after the data, so that the next section begins at a whole block."""
    shared: bool


@dataclass(frozen=True)
class Plan:
    """How all ranks write; made by rank 0 from what they hold."""

    sections: tuple[Section, ...]
    """One a rank."""
    shards: tuple[str, ...]
    """One a rank: the file that holds its slices."""
    tensors: dict[str, Any]
    """The manifest's."""
    num_bytes: int
    any_cut: bool
    any_shared: bool
    fits_in_memory: bool
    """Whether every host has room for a copy of what its ranks write."""


def prefix_of(rank: int) -> str:
    """Return what the keys of a rank begin with in a file that several share."""
    return f"rank-{rank:05d}/"


def make_plan(holdings: Sequence[Holding], files: Literal["auto", "rank", "node"]) -> Plan:
    """Return who writes where. A node's first rank writes the header of its file."""
    by_node = files == "node" or (files == "auto" and len(holdings) > RANKS_WITH_FILES_OF_THEIR_OWN)
    groups: dict[str, list[int]] = {}
    for rank, holding in enumerate(holdings):
        groups.setdefault(holding.host if by_node else str(rank), []).append(rank)
    sections: dict[int, Section] = {}
    for number, ranks in enumerate(groups.values()):
        file = f"node-{number:05d}.safetensors" if by_node else f"rank-{ranks[0]:05d}.safetensors"
        sections |= _sections(file, ranks, holdings)
    ordered = tuple(sections[rank] for rank in range(len(holdings)))
    tensors, any_cut = _tensors(holdings)
    return Plan(
        sections=ordered,
        shards=tuple(section.file for section in ordered),
        tensors=tensors,
        num_bytes=sum(
            len(section.header) + holding.num_bytes + section.padding
            for section, holding in zip(ordered, holdings, strict=True)
        ),
        any_cut=any_cut,
        any_shared=any(section.shared for section in ordered),
        fits_in_memory=_fits(holdings),
    )


def _sections(file: str, ranks: list[int], holdings: Sequence[Holding]) -> dict[int, Section]:
    shared = len(ranks) > 1
    places: list[tuple[str, str, int]] = []
    paddings: dict[int, int] = {}
    for rank in ranks:
        prefix = prefix_of(rank) if shared else ""
        places += [(prefix + key, dtype, count) for key, dtype, count in holdings[rank].places]
        paddings[rank] = padded(holdings[rank].num_bytes) - holdings[rank].num_bytes if shared else 0
        if paddings[rank]:
            places.append((f"{prefix}padding", "U8", paddings[rank]))
    header = header_of(places)
    assert len(header) % ALIGNMENT == 0
    sections: dict[int, Section] = {}
    start = 0
    for rank in ranks:
        own = header if rank == ranks[0] else b""
        sections[rank] = Section(file, start, own, paddings[rank], shared)
        start += len(own) + holdings[rank].num_bytes + paddings[rank]
    return sections


def _tensors(holdings: Sequence[Holding]) -> tuple[dict[str, Any], bool]:
    tensors: dict[str, Any] = {}
    any_cut = False
    for rank, holding in enumerate(holdings):
        for name, key, dtype, shape, start, count, cut in holding.slices:
            entry = tensors.setdefault(name, {"shape": list(shape), "states": {}})
            kept = entry["states"].setdefault(key, {"dtype": dtype, "slices": []})
            kept["slices"].append([rank, start, count, *([cut.to_json()] if cut else [])])
            any_cut |= cut is not None
    return tensors, any_cut


def _fits(holdings: Sequence[Holding]) -> bool:
    wanted: dict[str, int] = {}
    free: dict[str, int] = {}
    for holding in holdings:
        wanted[holding.host] = wanted.get(holding.host, 0) + padded(holding.num_bytes)
        free[holding.host] = min(free.get(holding.host, holding.free_memory_bytes), holding.free_memory_bytes)
    # The rest is for what training itself still allocates, and for whatever else runs there.
    return all(num_bytes <= 0.6 * free[host] for host, num_bytes in wanted.items())
