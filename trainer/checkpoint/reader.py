"""Read slices of logical tensors out of a checkpoint, whatever shape it was written at."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.checkpoint import layout, random_state
from trainer.checkpoint.manifest_rules import unsound
from trainer.checkpoint.pieces import Numbers, find_pieces, fits, split_at
from trainer.checkpoint.sections import prefix_of
from trainer.checkpoint.shard_file import DTYPES
from trainer.checkpoint.shard_reader import ShardReader
from trainer.checkpoint.writer import slice_key
from trainer.core.errors import CheckpointError
from trainer.parallel.cut import Cut

_OPEN_FILES = 32
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class _Slices:
    """The slices of one part, or of a tensor that is held whole, by first element."""

    starts: Numbers
    ends: Numbers
    shards: list[int]


@dataclass(frozen=True)
class _Held:
    """What a checkpoint holds of one state of a tensor."""

    dtype: torch.dtype
    parts: Mapping[Cut | None, _Slices]

    @classmethod
    def of(cls, state: Any, shape: tuple[int, ...], num_shards: int) -> _Held:
        """Sort the slices of a manifest's entry. Raises TypeError or ValueError if it can't be true."""
        found: dict[Cut | None, list[tuple[int, int, int]]] = {}
        for shard, start, count, *cut in state["slices"]:
            if not (0 <= shard < num_shards and start >= 0 and count >= 0):
                raise ValueError(f"no slice is [{shard}, {start}, {count}]")
            if count:
                found.setdefault(Cut(*cut[0]) if cut else None, []).append((start, start + count, shard))
        if not found and math.prod(shape):
            raise ValueError("it has no slices")
        cuts = [cut for cut in found if cut is not None]
        if not all(fits(shape, cut) for cut in cuts) or len({(cut.dim, cut.parts, cut.chunks) for cut in cuts}) > 1:
            raise ValueError("its parts don't make up one tensor")
        if state["dtype"] not in _DTYPES:
            raise ValueError(f"unknown dtype {state['dtype']!r}")
        parts: dict[Cut | None, _Slices] = {}
        for cut, slices in found.items():
            starts, ends, shards = zip(*sorted(slices), strict=True)
            parts[cut] = _Slices(np.array(starts, dtype=np.int64), np.array(ends, dtype=np.int64), list(shards))
        return cls(_DTYPES[state["dtype"]], parts)


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
        if (problem := unsound(manifest)) is not None:
            raise CheckpointError(f"{layout.manifest_path(directory)}: {problem}")
        self.directory = directory
        self.step: int = manifest["step"]
        self.world_size: int = manifest["world_size"]
        self.topology: dict[str, int] = manifest.get("topology", {})
        """Degrees it was written at; the first checkpoints do not say."""
        self.state: dict[str, Any] = manifest["state"]
        self.model: dict[str, Any] = manifest["model"]
        self._tensors: dict[str, Any] = manifest["tensors"]
        self._shards: list[str] = [name for name in manifest["shards"] if name in manifest["files"]]
        if self._shards != manifest["shards"]:
            raise CheckpointError(f"{directory}: the manifest names shards that it does not list")
        shared = Counter(self._shards)
        self._prefixes = [prefix_of(rank) if shared[name] > 1 else "" for rank, name in enumerate(self._shards)]
        self._readers: dict[str, ShardReader] = {}
        self._open: OrderedDict[str, None] = OrderedDict()
        """Shards whose file may be open, the least recently read first."""
        self._index: dict[tuple[str, str], _Held] = {}

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that were read so far."""
        return sum(shard.bytes_read for shard in self._readers.values())

    def names(self) -> list[str]:
        """Return the names of all logical tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the global shape of a logical tensor."""
        return tuple(self._tensors[name]["shape"])

    def read(self, name: str, key: str, start: int, count: int, cut: Cut | None = None) -> torch.Tensor:
        """Return ``count`` elements from ``start`` of the flattened tensor, or of its part ``cut``, on the CPU.

        Whatever parts the checkpoint holds, only the bytes of these elements are read, into the result.
        Raises CheckpointError if the checkpoint has no such state or does not cover the range.
        """
        held = self._held(name, key)
        shape = self.shape(name)
        if not 0 <= start <= start + count <= math.prod(cut.part_shape(shape) if cut else shape):
            raise CheckpointError(f"{self.directory}: {name!r} {key!r} has no {count} elements from {start}")
        result = torch.empty(count, dtype=held.dtype)
        if not count:
            return result
        if cut in held.parts:  # as such: one part in one piece
            shape, cut, like, parts = (math.prod(shape),), None, None, {0: held.parts[cut]}
        elif None in held.parts:
            like, parts = None, {0: held.parts[None]}
        else:
            like, parts = next(iter(held.parts)), {part.part: found for part, found in held.parts.items() if part}
        for pieces in find_pieces(shape, cut, like, start, count):
            for part in np.unique(pieces.part).tolist():
                if part not in parts:
                    raise CheckpointError(f"{self.directory}: parts of {name!r} {key!r} are missing")
                mine = pieces.part == part
                self._read_part(
                    name, key, parts[part], pieces.start[mine], pieces.count[mine], pieces.out[mine], result
                )
        return result

    def _read_part(
        self, name: str, key: str, held: _Slices, start: Numbers, count: Numbers, out: Numbers, result: torch.Tensor
    ) -> None:
        """Read pieces of one held part, which may lie in several shards."""
        which, slices, offset = split_at(held.starts, start, count)
        low = start[which] + offset
        high = np.minimum(start[which] + count[which], np.append(held.starts[1:], np.iinfo(np.int64).max)[slices])
        missing = (slices < 0) | (high > held.ends[slices])
        if missing.any():
            first = int(low[missing][0])
            raise CheckpointError(f"{self.directory}: {name!r} {key!r} lacks elements from {first} in every shard")
        out = out[which] + offset
        for number in np.unique(slices).tolist():
            mine = slices == number
            index = held.shards[number]
            places = low[mine] - held.starts[number], (high - low)[mine], out[mine]
            self._shard(index).read_pieces(self._prefixes[index] + slice_key(name, key), *places, result)

    def _held(self, name: str, key: str) -> _Held:
        """Return what the checkpoint holds of a state. Raises CheckpointError if it is nothing, or can't be true."""
        if (name, key) not in self._index:
            state = self._tensors.get(name, {}).get("states", {}).get(key)
            if state is None:
                raise CheckpointError(f"{self.directory} holds no {key!r} of {name!r}")
            try:
                self._index[name, key] = _Held.of(state, self.shape(name), len(self._shards))
            except (TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{self.directory}: what the manifest says of {name!r} {key!r}: {error}"
                ) from None
        return self._index[name, key]

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
        """Return the reader of a shard; few of them have their file open."""
        name = self._shards[index]
        if name not in self._readers:
            self._readers[name] = ShardReader(self.directory / name)
        self._open[name] = None
        self._open.move_to_end(name)
        if len(self._open) > _OPEN_FILES:
            self._readers[self._open.popitem(last=False)[0]].close()
        return self._readers[name]
