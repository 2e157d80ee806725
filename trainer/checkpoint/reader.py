"""Read slices of logical tensors out of a checkpoint, whatever shape it was written at."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any, cast

import torch

from trainer.checkpoint import layout, random_state
from trainer.checkpoint.sections import prefix_of
from trainer.checkpoint.shard_file import ShardReader
from trainer.checkpoint.writer import slice_key
from trainer.core.errors import CheckpointError
from trainer.parallel.cut import Cut


class CheckpointReader:
    """Implements trainer.engine.base.StateReader over one committed checkpoint."""

    def __init__(self, directory: Path) -> None:
        """Open ``directory``. Raises CheckpointError if it is incomplete or of a newer format."""
        problems = layout.find_problems(directory)
        if problems:
            raise CheckpointError(f"{directory} is no complete checkpoint: " + "; ".join(problems))
        manifest = layout.read_manifest(directory)
        assert manifest is not None
        if manifest.get("version") not in layout.VERSIONS:
            raise CheckpointError(
                f"{directory}: format version {manifest.get('version')!r}, this trainer reads {layout.VERSION}: "
                "upgrade it"
            )
        self.directory = directory
        self.step: int = manifest["step"]
        self.world_size: int = manifest["world_size"]
        self.state: dict[str, Any] = manifest["state"]
        self.model: dict[str, Any] = manifest["model"]
        self._tensors: dict[str, Any] = manifest["tensors"]
        self._shards: list[str] = [name for name in manifest["shards"] if name in manifest["files"]]
        if self._shards != manifest["shards"]:
            raise CheckpointError(f"{directory}: the manifest names shards that it does not list")
        shared = Counter(self._shards)
        self._prefixes = [prefix_of(rank) if shared[name] > 1 else "" for rank, name in enumerate(self._shards)]
        self._open: dict[str, ShardReader] = {}

    def names(self) -> list[str]:
        """Return the names of all logical tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the global shape of a logical tensor."""
        return tuple(self._tensors[name]["shape"])

    def read(self, name: str, key: str, start: int, count: int, cut: Cut | None = None) -> torch.Tensor:
        """Return ``count`` elements from ``start`` of the flattened tensor, or of its part ``cut``, on the CPU.

        A part that the checkpoint does not hold as such is cut out of the whole tensor.
        Raises CheckpointError if the checkpoint has no such state or does not cover the range.
        """
        states = self._tensors.get(name, {}).get("states", {})
        if key not in states:
            raise CheckpointError(f"{self.directory} holds no {key!r} of {name!r}")
        slices = [(*entry[:3], Cut(*entry[3]) if len(entry) > 3 else None) for entry in states[key]["slices"]]
        held = {entry[3] for entry in slices}
        if cut not in held:
            whole = self._assembled(name, key, held)
            return (cut.take(whole) if cut else whole).flatten()[start : start + count]
        result = torch.empty(count, dtype=getattr(torch, states[key]["dtype"]))
        filled = 0
        for index, slice_start, slice_count, slice_cut in slices:
            if slice_cut != cut:
                continue
            low, high = max(start, slice_start), min(start + count, slice_start + slice_count)
            if low < high:
                held_key = self._prefixes[index] + slice_key(name, key)
                piece = self._shard(index).read(held_key, low - slice_start, high - low)
                result[low - start : high - start] = piece
                filled += high - low
        if filled != count:
            raise CheckpointError(f"{self.directory}: {name!r} {key!r} has {filled} of {count} elements from {start}")
        return result

    def _assembled(self, name: str, key: str, held: set[Cut | None]) -> torch.Tensor:
        """Return a whole tensor, put together from its parts if need be. Raises CheckpointError if one is missing."""
        if None in held:
            return self.whole(name, key)
        shape = self.shape(name)
        parts = cast("set[Cut]", held)
        first = min(parts, key=lambda cut: cut.part)
        if {cut.part for cut in parts} != set(range(first.parts)) or len(parts) != first.parts:
            raise CheckpointError(f"{self.directory}: parts of {name!r} {key!r} are missing")
        result = torch.empty(shape, dtype=getattr(torch, self._tensors[name]["states"][key]["dtype"]))
        for cut in parts:
            part = cut.part_shape(shape)
            cut.put(self.read(name, key, 0, math.prod(part), cut).reshape(part), result)
        return result

    def whole(self, name: str, key: str = "weight") -> torch.Tensor:
        """Return a whole logical tensor in its shape."""
        shape = self.shape(name)
        return self.read(name, key, 0, math.prod(shape)).reshape(shape)

    def random_states(self, rank: int) -> dict[str, torch.Tensor]:
        """Return what ``random_state.capture`` returned on ``rank``."""
        shard, prefix = self._shard(rank), self._prefixes[rank]
        keys = [key for key in shard.keys() if key.startswith(prefix + random_state.PREFIX)]  # noqa: SIM118 - no mapping
        return {key.removeprefix(prefix): shard.read(key, 0, 2**31) for key in keys}

    def _shard(self, index: int) -> ShardReader:
        name = self._shards[index]
        if name not in self._open:
            self._open[name] = ShardReader(self.directory / name)
        return self._open[name]
