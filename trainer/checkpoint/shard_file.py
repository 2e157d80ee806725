"""One rank's shard: a safetensors file of flat slices, written in one pass and hashed while it is written.

The format is safetensors' own (8-byte header length, JSON header, raw little-endian data), so any tool opens it. It is
written here because the library wants every tensor as bytes in memory first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

_DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Entry:
    """A flat tensor of a shard; ``read`` is called when it is written, since not all of them may be in memory."""

    key: str
    dtype: torch.dtype
    count: int
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, key: str, tensor: torch.Tensor) -> Entry:
        """Return the entry of a tensor in memory."""
        return cls(key, tensor.dtype, tensor.numel(), lambda: tensor)


def write_shard(path: Path, entries: Sequence[Entry]) -> tuple[int, str]:
    """Write flat tensors under unique keys, fsync, and return (bytes, xxh3_64 hex). Raises OSError."""
    header: dict[str, object] = {}
    offset = 0
    for entry in entries:
        end = offset + entry.count * entry.dtype.itemsize
        header[entry.key] = {"dtype": _DTYPES[entry.dtype], "shape": [entry.count], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_64()
    with path.open("xb") as file:
        for block in (len(text).to_bytes(8, "little"), text):
            digest.update(block)
            file.write(block)
        for entry in entries:
            flat = entry.read().detach().cpu().contiguous().view(torch.uint8).numpy().data
            for start in range(0, len(flat), _CHUNK_BYTES):
                chunk = flat[start : start + _CHUNK_BYTES]
                digest.update(chunk)
                file.write(chunk)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def hash_file(path: Path) -> str:
    """Return the xxh3_64 of a file's contents. Raises OSError."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
