"""Read pieces of the flat tensors of one safetensors file: those bytes and no others, in bounded memory.

The library maps files into memory, where what was read once stays counted as this process's, and where a file that
shrinks is SIGBUS. Read with pread it is neither.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from trainer.checkpoint.pieces import Numbers
from trainer.checkpoint.shard_file import DTYPES
from trainer.core.errors import CheckpointError

_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_PAGE_BYTES = 4096
"""Pieces nearer than that are read together: the disk reads the page between them anyway."""
_BLOCK_BYTES = 1 << 20
_HEADER_BYTES = 100_000_000
"""As much as the library reads."""


@dataclass(frozen=True)
class _Place:
    dtype: torch.dtype
    count: int
    offset: int
    """First byte, in the file."""


class ShardReader:
    """One file. Its header stays in memory; the file is opened when it is read and may be let go any time."""

    def __init__(self, path: Path) -> None:
        """Read the header. Raises CheckpointError if it is none, or does not fit the file."""
        self._path = path
        self._file: BinaryIO | None = None
        self.bytes_read = 0
        """Bytes of data so far, without the header."""
        self._places = self._read_header()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; the next read opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def keys(self) -> set[str]:
        """Return the keys of the shard."""
        return set(self._places)

    def places(self) -> dict[str, tuple[str, int]]:
        """Return (dtype as torch calls it, number of elements) of every tensor, by key."""
        return {key: (str(place.dtype).removeprefix("torch."), place.count) for key, place in self._places.items()}

    def read(self, key: str, start: int, count: int) -> torch.Tensor:
        """Return ``count`` elements of the flat tensor ``key`` from ``start``, or what there is of them."""
        place = self._place(key)
        count = max(0, min(count, place.count - start))
        result = torch.empty(count, dtype=place.dtype)
        ranges = np.array([start], dtype=np.int64), np.array([count], dtype=np.int64), np.zeros(1, dtype=np.int64)
        self.read_pieces(key, *ranges, result)
        return result

    def read_pieces(self, key: str, start: Numbers, count: Numbers, out: Numbers, result: torch.Tensor) -> None:
        """Read elements ``start`` .. ``start + count`` of the flat tensor ``key`` to ``result[out:]``, piece by piece.

        The pieces are in the order of the file. Raises CheckpointError if the tensor has another dtype or too few.
        """
        place = self._place(key)
        if place.dtype != result.dtype:
            raise CheckpointError(f"{self._path}: {key} is {place.dtype}, the manifest says {result.dtype}")
        if not result.numel():
            return
        if int((start + count).max()) > place.count:
            raise CheckpointError(f"{self._path}: {key} has {place.count} elements, the manifest says more")
        size = place.dtype.itemsize
        # As whole numbers of the elements' size: NumPy knows no bfloat16.
        target = result.view(torch.uint8).numpy().view(f"u{size}")
        for low, high in _together(start * size, count * size):
            first, last = int(start[low]), int(start[high - 1] + count[high - 1])
            if high == low + 1:
                self._fill(target[out[low] : out[low] + count[low]], place.offset + first * size)
            else:
                block = np.empty(last - first, dtype=target.dtype)
                self._fill(block, place.offset + first * size)
                _scatter(block, start[low:high] - first, count[low:high], out[low:high], target)

    def _fill(self, buffer: np.ndarray[Any, Any], offset: int) -> None:
        """Fill ``buffer`` with the bytes of the file from ``offset``."""
        if self._file is None:
            self._file = self._path.open("rb", buffering=0)
        left = buffer.view(np.uint8).data
        self.bytes_read += len(left)
        while left:
            got = os.preadv(self._file.fileno(), [left], offset)
            if got == 0:
                raise CheckpointError(f"{self._path}: ends at {offset} bytes, it was cut off")
            left, offset = left[got:], offset + got

    def _place(self, key: str) -> _Place:
        place = self._places.get(key)
        if place is None:
            raise CheckpointError(f"{self._path}: holds no {key}, the manifest says it does")
        return place

    def _read_header(self) -> dict[str, _Place]:
        with self._path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{self._path}: is no safetensors file")
            try:
                header: object = json.loads(file.read(length))
            except (ValueError, RecursionError) as error:
                raise CheckpointError(f"{self._path}: is no safetensors file ({error})") from None
        places: dict[str, _Place] = {}
        for key, facts in cast("dict[str, object]", header).items() if isinstance(header, dict) else ():
            if key == "__metadata__":
                continue
            match facts:
                case {"dtype": str(name), "shape": [int(count)], "data_offsets": [int(low), int(high)]} if (
                    name in _DTYPES
                    and 0 <= low <= high <= size - 8 - length
                    and high - low == count * _DTYPES[name].itemsize
                ):
                    places[key] = _Place(_DTYPES[name], count, 8 + length + low)
                case _:
                    raise CheckpointError(f"{self._path}: what its header says of {key} is no flat tensor in this file")
        return places


def _together(start: Numbers, num_bytes: Numbers) -> list[tuple[int, int]]:
    """Return (first, behind the last) of the pieces to read at once: small ones, near each other, to a bound."""
    small = num_bytes < _PAGE_BYTES
    near = start[1:] - (start[:-1] + num_bytes[:-1]) < _PAGE_BYTES
    block = (start - start[0]) // (_BLOCK_BYTES - _PAGE_BYTES)
    joined = small[1:] & small[:-1] & near & (block[1:] == block[:-1])
    bounds = [0, *(np.flatnonzero(~joined) + 1).tolist(), len(start)]
    return list(pairwise(bounds))


def _scatter(
    block: np.ndarray[Any, Any], start: Numbers, count: Numbers, out: Numbers, target: np.ndarray[Any, Any]
) -> None:
    """Copy pieces of ``block`` to where they go."""
    within = np.arange(int(count.sum()), dtype=np.int64) - np.repeat(np.cumsum(count) - count, count)
    target[np.repeat(out, count) + within] = block[np.repeat(start, count) + within]
