"""Where DeepSpeed's ZeRO stages keep a parameter: pieces of flat partitions, one partition a rank and group.

ZeRO-1 and 2 (and BF16_Optimizer) lay the parameters of a group end to end, in the order of ``param_shapes``, each
followed by its ``param_alignment_paddings``, and cut the whole into one partition a rank. The last partitions end in
padding; some tensors are saved without it, so partitions are laid end to end as long as they are.
ZeRO-3 cuts every parameter into equal pieces, one a rank, the last one padded, and a rank lays its pieces of a
sub-group end to end, in the order of ``param_shapes``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from trainer.checkpoint.import_pickle import FragmentAddress, Node
from trainer.checkpoint.import_source import ForeignTensor

_PADDING = 2
"""Elements a rank that a flat group may be padded by: DeepSpeed aligns it to so many."""


@dataclass(frozen=True)
class Place:
    """A parameter and where it begins: in the whole flat group (ZeRO-1, 2), or in each rank's flat (ZeRO-3)."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def places_of(shapes: Node, length: Callable[[int], int], paddings: Sequence[int] | None = None) -> list[Place]:
    """Lay the parameters of a group end to end; each takes ``length(number of elements)`` and its padding."""
    named = shapes.named()
    if paddings is not None and len(paddings) != len(named):
        raise shapes.unlike(f"has {len(named)} parameters, param_alignment_paddings {len(paddings)}")
    found: list[Place] = []
    start = 0
    for number, (name, shape) in enumerate(named):
        found.append(Place(name, shape.shape(), start))
        start += length(found[-1].count) + (paddings[number] if paddings else 0)
    return found


def partitioned(places: Sequence[Place], partitions: Sequence[Node]) -> Iterator[tuple[str, ForeignTensor]]:
    """Yield the parameters of a flat group of ZeRO-1 or 2, from its partitions in rank order.

    Raises RefusedError if there are fewer elements than parameters, or more than padding explains.
    """
    flats = [partition.flat() for partition in partitions]
    end = max((place.start + place.count for place in places), default=0)
    held = sum(flat.numel() for flat in flats)
    if not 0 <= held - end < _PADDING * len(flats) + 1:
        raise partitions[0].unlike(f"all ranks together hold {held} elements, its parameters have {end}")

    def reader(place: Place) -> Callable[[], torch.Tensor]:
        return lambda: _assembled(place, flats)

    for place in places:
        yield place.name, ForeignTensor(place.shape, torch.float32, reader(place))


def _assembled(place: Place, flats: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a parameter, put together from the partitions that hold some of it."""
    whole = torch.empty(place.count, dtype=torch.float32)
    left = 0  # first element of the partition, counted in the whole group
    for flat in flats:
        low, high = max(place.start, left), min(place.start + place.count, left + flat.numel())
        if low < high:
            whole[low - place.start : high - place.start] = flat[low - left : high - left]
        left += flat.numel()
    return whole.reshape(place.shape)


def refuse_other_addresses(places: Sequence[Place], partitions: Sequence[Node], addresses: Sequence[Node]) -> None:
    """Compare where the parameters lie with what each rank's ``param_slice_mappings`` say. Raises RefusedError.

    ``partitions`` are padded ones, or end where the parameters do.
    """
    left = 0
    for partition, mapping in zip(partitions, addresses, strict=True):
        right = left + partition.flat().numel()
        expected = {
            place.name: (max(place.start, left) - left, min(place.start + place.count, right) - max(place.start, left))
            for place in places
            if max(place.start, left) < min(place.start + place.count, right)
        }
        found = {name: _address(node) for name, node in mapping.named()}
        if found != expected:
            name = next(iter(sorted(found.items() ^ expected.items())))[0]
            raise mapping.unlike(f"puts {name} at {found.get(name)}, param_shapes at {expected.get(name)}")
        left = right


def _address(node: Node) -> tuple[int, int]:
    address = node.value
    if not isinstance(address, FragmentAddress) or type(address.start) is not int or type(address.numel) is not int:
        raise node.unlike("is no address in a partition")
    return address.start, address.numel


def piece_length(count: int, world_size: int) -> int:
    """Return how many elements of a parameter each rank holds under ZeRO-3, padding included."""
    return -(-count // world_size)


def sharded(places: Sequence[Place], flats: Sequence[Node]) -> Iterator[tuple[str, ForeignTensor]]:
    """Yield the parameters of a sub-group of ZeRO-3, from its flat tensors in rank order. Raises RefusedError."""
    world_size = len(flats)
    end = max((place.start + piece_length(place.count, world_size) for place in places), default=0)
    for node in flats:
        held = node.flat().numel()
        if not 0 <= held - end < _PADDING * world_size + 1:
            rule = f"holds {held} elements, its parameters have {end}"
            raise node.unlike(rule + ("" if held else ": what lies on NVMe is in files that are not part of it"))
    tensors = [node.flat() for node in flats]

    def reader(place: Place) -> Callable[[], torch.Tensor]:
        length = piece_length(place.count, world_size)
        return lambda: joined([flat[place.start : place.start + length] for flat in tensors], place.shape).float()

    for place in places:
        yield place.name, ForeignTensor(place.shape, torch.float32, reader(place))


def joined(pieces: Sequence[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """Return a parameter of ZeRO-3 from the pieces of all ranks, without the padding of the last."""
    return torch.cat(list(pieces))[: math.prod(shape)].reshape(shape)
