"""A file of flat tensors in safetensors' format, written by one rank or by those of a node, each its own section.

The format is an 8-byte header length, a JSON header and raw little-endian data, so any tool opens it. It is written
here because the library wants every tensor as bytes in memory first, and one writer a file. Sections begin at multiples
of 4096 bytes and are written past the page cache where the file system can, which costs hardly any processor time
(docs/benchmarks.md).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy
import torch
import xxhash

from trainer.core import phases
from trainer.core.private import file_mode

DTYPES = {
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
ALIGNMENT = 4096
"""What direct writes need of places, lengths and memory, on every common device."""
CHUNK_BYTES = 16 * 2**20


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

    @property
    def place(self) -> tuple[str, str, int]:
        """Key, dtype as safetensors calls it, and number of elements."""
        return self.key, DTYPES[self.dtype], self.count

    @property
    def num_bytes(self) -> int:
        """Bytes of data."""
        return self.count * self.dtype.itemsize

    def bytes(self) -> torch.Tensor:
        """Return the data, uint8 [num_bytes], on the device it lies on."""
        return self.read().detach().contiguous().view(torch.uint8)


def padded(num_bytes: int) -> int:
    """Return ``num_bytes`` rounded up to whole blocks."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def header_of(places: Sequence[tuple[str, str, int]]) -> bytes:
    """Return the header of tensors that follow each other, with spaces up to a whole block."""
    sizes = {name: dtype.itemsize for dtype, name in DTYPES.items()}
    fields: dict[str, object] = {}
    offset = 0
    for key, dtype, count in places:
        end = offset + count * sizes[dtype]
        fields[key] = {"dtype": dtype, "shape": [count], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (padded(8 + len(text)) - 8 - len(text))
    return len(text).to_bytes(8, "little") + text


class Image:
    """A section in memory, as it will lie in the file: kept from save to save."""

    def __init__(self, header: bytes, entries: Sequence[Entry], pinned: bool) -> None:
        """Allocate and touch the memory, so that no save pays for it. Raises MemoryError or OSError."""
        self.num_bytes = len(header) + sum(entry.num_bytes for entry in entries)
        size = max(ALIGNMENT, padded(self.num_bytes))
        self._bytes = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)  # begins at a page
        self._bytes.zero_()
        # Registered, not allocated pinned: torch's allocator rounds up to a power of two.
        runtime: Any = torch.cuda.cudart() if pinned else None
        self._pinned = pinned and runtime.cudaHostRegister(self._bytes.data_ptr(), size, 0) == 0
        self._bytes.numpy()[: len(header)] = numpy.frombuffer(header, dtype=numpy.uint8)
        self._start = len(header)

    def fill(self, entries: Sequence[Entry]) -> None:
        """Copy the tensors; they may change again when this returns."""
        offset = self._start
        for entry in entries:
            end = offset + entry.num_bytes
            self._bytes[offset:end].copy_(entry.bytes(), non_blocking=True)
            offset = end
        if self._pinned:
            torch.cuda.synchronize()

    def chunks(self) -> Iterator[tuple[memoryview, int]]:
        """Yield (whole blocks, bytes of them that count)."""
        view = self._bytes.numpy().data
        for start in range(0, self.num_bytes, CHUNK_BYTES):
            count = min(CHUNK_BYTES, self.num_bytes - start)
            yield view[start : start + padded(count)], count


def streamed(header: bytes, entries: Sequence[Entry]) -> Iterator[tuple[memoryview, int]]:
    """Yield (whole blocks, bytes of them that count) of a section that is never in memory as a whole."""
    buffer = torch.frombuffer(mmap.mmap(-1, CHUNK_BYTES), dtype=torch.uint8)
    view, filled = buffer.numpy().data, 0

    def pieces() -> Iterator[torch.Tensor]:
        yield torch.from_numpy(numpy.frombuffer(bytearray(header), dtype=numpy.uint8))
        for entry in entries:
            yield entry.bytes()

    for piece in pieces():
        start = 0
        while start < len(piece):
            count = min(len(piece) - start, CHUNK_BYTES - filled)
            buffer[filled : filled + count].copy_(piece[start : start + count])
            start, filled = start + count, filled + count
            if filled == CHUNK_BYTES:
                yield view, filled
                filled = 0
    if filled:
        yield view[: padded(filled)], filled


def write_section(
    path: Path, start: int, chunks: Iterator[tuple[memoryview, int]], after_chunk: Callable[[], None]
) -> tuple[int, str]:
    """Write a section of a file from byte ``start``, fsync, and return (bytes, xxh3_64 hex). Raises OSError.

    Every chunk but the last fills whole blocks. ``after_chunk`` is called after each.
    """
    digest = xxhash.xxh3_64()
    position = start
    with _File(path) as file:
        for blocks, count in chunks:
            digest.update(blocks[:count])
            file.write(blocks, position)
            position += count
            after_chunk()
        file.finish(position)
    return position - start, digest.hexdigest()


class _File:
    """Writes whole blocks, past the page cache if the file system lets it."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._descriptor = os.open(path, flags | os.O_DIRECT, file_mode())
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor = os.open(path, flags, file_mode())
        self._path = path

    def __enter__(self) -> _File:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            os.close(self._descriptor)

    def write(self, blocks: memoryview, position: int) -> None:
        while blocks:
            try:
                written = os.pwrite(self._descriptor, blocks, position)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct():
                    raise OSError(error.errno, error.strerror, str(self._path)) from error
                continue
            if written % ALIGNMENT:  # cut short in a block: by a limit that the next write will name
                self._direct()
            blocks, position = blocks[written:], position + written

    def _direct(self) -> bool:
        """Return whether writes were direct; those that follow are not."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return bool(flags & os.O_DIRECT)

    def finish(self, size: int) -> None:
        """Cut off what fills the last block, if it is the file's last, and make all of it durable."""
        if size % ALIGNMENT:
            os.ftruncate(self._descriptor, size)
        os.fsync(self._descriptor)


def hash_file(path: Path, sizes: Sequence[int] | None = None) -> list[str]:
    """Return the xxh3_64 of each of consecutive ranges of a file; without ``sizes`` of all of it. Raises OSError."""
    found: list[str] = []
    with path.open("rb") as file:
        for size in sizes or (os.fstat(file.fileno()).st_size,):
            digest, left = xxhash.xxh3_64(), size
            while left and (chunk := file.read(min(CHUNK_BYTES, left))):
                digest.update(chunk)
                left -= len(chunk)
                phases.board.advance()  # a start may hash for hours
            found.append(digest.hexdigest())
    return found
