"""Read token shards through and report every place that is damaged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.core.errors import DataError, Problem
from trainer.data.shard_index import LENGTH_DTYPE, OFFSET_DTYPE
from trainer.data.shard_reader import TokenShards, sampled_blocks
from trainer.data.shard_set import ShardSet
from trainer.data.shard_sidecar import BLOCK_BYTES, block_hash, stream_hash

# Blocks of .bin that a quick check reads (128 MiB), evenly spaced.
SAMPLED_BLOCKS = 32
_CHUNK = 1 << 18
_FIX = "restore this file from a copy, or tokenize the text again"


def verify_source(source: str, full: bool = False) -> list[Problem]:
    """Return what is wrong with a source of any kind: ``verify`` of each of its members.

    Of a large set a quick check looks at 32 shards, evenly spaced, and at the sizes of all.
    """
    try:
        opened = ShardSet(source)
    except DataError as error:
        return error.problems
    chosen = range(opened.num_shards) if full else sampled_blocks(opened.num_shards, SAMPLED_BLOCKS)
    problems: list[Problem] = []
    for shard in (opened.shards[i] for i in chosen):
        if shard.kind == "megatron":
            problems += verify(shard.path, full)
        problems += shard.problems()
    opened.close()
    return problems


def verify(prefix: str | os.PathLike[str], full: bool = False) -> list[Problem]:
    """Return what is wrong with the shards; an empty list means that nothing is.

    Always reads the whole index. Of ``.bin`` it checks 32 blocks, or all with ``full``; ``full`` also looks at every
    token id. Without a side-car there are no checksums: structure and ids below zero are all that can be checked.
    """
    try:
        shards = TokenShards(prefix)
    except DataError as error:
        return error.problems
    try:
        return [*_index_problems(shards), *_bin_problems(shards, full)]
    except DataError as error:  # the files changed while they were read
        return error.problems
    finally:
        shards.close()


def _index_problems(shards: TokenShards) -> Iterator[Problem]:
    path, header = str(shards.paths.idx), shards.header
    with open(shards.paths.idx, "rb") as idx:
        if shards.sidecar is not None and (found := stream_hash(idx)) != shards.sidecar.idx_hash:
            yield Problem(path, found, f"its checksum must be {shards.sidecar.idx_hash}", _FIX)
        descriptor, expected = idx.fileno(), 0
        for first in range(0, header.num_sequences, _CHUNK):
            count = min(_CHUNK, header.num_sequences - first)
            lengths = _entries(descriptor, header.lengths_offset, first, count, LENGTH_DTYPE).astype(np.int64)
            pointers = _entries(descriptor, header.pointers_offset, first, count, OFFSET_DTYPE)
            if (wrong := np.flatnonzero(lengths < 0)).size:
                sequence = first + int(wrong[0])
                yield Problem(
                    f"{path} at byte {header.lengths_offset + 4 * sequence}",
                    int(lengths[wrong[0]]),
                    f"sequence {sequence} has a negative length",
                    _FIX,
                )
                return
            ends = expected + np.cumsum(lengths) * shards.dtype.itemsize
            starts = ends - lengths * shards.dtype.itemsize
            if (wrong := np.flatnonzero(pointers != starts)).size:
                sequence = first + int(wrong[0])
                yield Problem(
                    f"{path} at byte {header.pointers_offset + 8 * sequence}",
                    int(pointers[wrong[0]]),
                    f"sequence {sequence} must start at byte {int(starts[wrong[0]])} of .bin: the end of the last one",
                    _FIX,
                )
                return
            expected = int(ends[-1])
        yield from _document_problems(shards, descriptor)


def _document_problems(shards: TokenShards, descriptor: int) -> Iterator[Problem]:
    header, previous = shards.header, 0
    for first in range(0, header.num_document_entries, _CHUNK):
        count = min(_CHUNK, header.num_document_entries - first)
        entries = _entries(descriptor, header.documents_offset, first, count, OFFSET_DTYPE)
        steps = np.diff(entries, prepend=previous)
        if (wrong := np.flatnonzero(steps < 0)).size:
            entry = first + int(wrong[0])
            yield Problem(
                f"{shards.paths.idx} at byte {header.documents_offset + 8 * entry}",
                int(entries[wrong[0]]),
                f"document index entry {entry} is smaller than the one before",
                _FIX,
            )
            return
        previous = int(entries[-1])


def _bin_problems(shards: TokenShards, full: bool) -> Iterator[Problem]:
    sidecar = shards.sidecar
    block_bytes = sidecar.block_bytes if sidecar else BLOCK_BYTES
    num_blocks = -(-shards.num_tokens * shards.dtype.itemsize // block_bytes)
    blocks = range(num_blocks) if full else sampled_blocks(num_blocks, SAMPLED_BLOCKS)
    vocab_size = sidecar.vocab_size if sidecar else 2**63 - 1
    reported_id = False
    for block in blocks:
        data = shards.read_bytes(block * block_bytes, block_bytes)
        if sidecar is not None and (found := block_hash(data)) != sidecar.bin_blocks[block]:
            start = block * block_bytes
            yield Problem(
                f"{shards.paths.bin} bytes {start}..{start + len(data)}",
                found,
                f"the checksum of block {block} must be {sidecar.bin_blocks[block]}",
                _FIX,
            )
        if reported_id or block_bytes % shards.dtype.itemsize:
            continue
        ids = np.frombuffer(data, dtype=shards.dtype)
        if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
            place = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
            reported_id = True  # one is enough: a wrong vocabulary size would report every block
            yield Problem(
                f"{shards.paths.bin} at token {block * block_bytes // shards.dtype.itemsize + place}",
                int(ids[place]),
                f"token id outside 0..{vocab_size - 1}",
                _FIX,
            )


def _entries(descriptor: int, offset: int, first: int, count: int, dtype: np.dtype[Any]) -> NDArray[np.int64]:
    raw = os.pread(descriptor, count * dtype.itemsize, offset + first * dtype.itemsize)
    if len(raw) != count * dtype.itemsize:
        raise DataError(Problem("index", len(raw), "has become shorter while it was read", _FIX), title="token shards")
    return np.frombuffer(raw, dtype=dtype)
