"""Does a manifest account for every element of every state exactly once? Arithmetic only; nothing is opened."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

_CutFields = tuple[int, int, int, int]
"""(dim, part, parts, chunks)"""


def coverage_problems(manifest: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each state with a gap, an overlap, a missing part or slices that can't be true."""
    tensors, shards = manifest.get("tensors"), manifest.get("shards")
    if not isinstance(tensors, dict) or not isinstance(shards, list):
        return ["the manifest lists no tensors or no shards"]
    num_shards = len(cast("list[object]", shards))
    problems: list[str] = []
    for name, entry in cast("dict[str, Any]", tensors).items():
        try:
            shape = tuple(int(size) for size in entry["shape"])
            states = dict(entry["states"])
        except (TypeError, KeyError, ValueError):
            problems.append(f"{name}: no shape and states in the manifest")
            continue
        if not states:
            problems.append(f"{name}: has no state")
        for key, state in states.items():
            try:
                problems += [f"{name} {key}: {what}" for what in _state_problems(state, shape, num_shards)]
            except (TypeError, KeyError, ValueError, IndexError):
                problems.append(f"{name} {key}: what the manifest says of it can't be read")
    return problems


def _state_problems(state: Mapping[str, Any], shape: tuple[int, ...], num_shards: int) -> Iterator[str]:
    found: dict[_CutFields | None, list[tuple[int, int]]] = {}
    holders: set[int] = set()
    for shard, start, count, *cut in state["slices"]:
        if not (0 <= shard < num_shards and start >= 0 and count >= 0):
            yield f"no slice is [{shard}, {start}, {count}] ({num_shards} shards)"
            return
        if shard in holders:
            yield f"shard {shard} is named twice"
        holders.add(shard)
        if count:
            dim, part, parts, chunks = cut[0] if cut else (0, 0, 1, 1)
            found.setdefault((dim, part, parts, chunks) if cut else None, []).append((start, start + count))
    size = math.prod(shape)
    cuts = [cut for cut in found if cut is not None]
    if cuts:
        if None in found:
            yield "is held whole and in parts too"
        yield from _cut_problems(cuts, shape)
        size //= max(1, cuts[0][2])
    elif not found and size:
        yield f"no shard holds any of its {size:,} elements"
    for cut, ranges in found.items():
        where = f" of part {cut[1]} of {cut[2]}" if cut else ""
        for what in range_problems(ranges, size if cut or not cuts else math.prod(shape)):
            yield what + where


def _cut_problems(cuts: list[_CutFields], shape: tuple[int, ...]) -> Iterator[str]:
    dim, _, parts, chunks = cuts[0]
    if any((cut[0], cut[2], cut[3]) != (dim, parts, chunks) for cut in cuts):
        yield "its parts are of different cuts"
        return
    if not (0 <= dim < len(shape) and parts > 0 and chunks > 0) or shape[dim] % (parts * chunks):
        yield f"a shape of {list(shape)} can't be cut into {parts} parts of {chunks} chunks along dim {dim}"
        return
    held = {cut[1] for cut in cuts}
    missing = [part for part in range(parts) if part not in held]
    if missing:
        yield f"no shard holds part {', '.join(map(str, missing[:8]))} of {parts}"
    if not held <= set(range(parts)):
        yield f"has parts beyond its {parts}"


def range_problems(ranges: list[tuple[int, int]], size: int) -> Iterator[str]:
    """Yield where [first, behind the last) ranges leave out or repeat elements of 0 .. size, or go beyond them."""
    end = 0
    for low, high in sorted(ranges):
        if low > end:
            yield f"elements {end:,}..{low - 1:,} are in no shard"
        elif low < end:
            yield f"elements {low:,}..{min(end, high) - 1:,} are in two shards"
        end = max(end, high)
    if end < size:
        yield f"elements {end:,}..{size - 1:,} are in no shard"
    elif end > size:
        yield f"elements {size:,}..{end - 1:,} are beyond its end"
