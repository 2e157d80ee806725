"""Byte layout of Megatron's ``.idx`` file (MMIDIDX version 1): header, sizes, token dtypes.

| offset | type | meaning |
|---|---|---|
| 0 | 9 bytes | magic ``MMIDIDX\\0\\0`` |
| 9 | uint64 | version, 1 |
| 17 | uint8 | token dtype code |
| 18 | uint64 | S, number of sequences |
| 26 | uint64 | D, entries of the document index (documents + 1) |
| 34 | int32[S] | tokens per sequence |
| 34+4S | int64[S] | byte offset of each sequence in ``.bin`` |
| 34+12S | int64[D] | document index: document d = sequences [x[d], x[d+1]) |
| 34+12S+8D | int8[S] | only in multimodal files; nothing but the file size tells |
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.core.errors import DataError, Problem

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
MAX_SEQUENCE_TOKENS = 2**31 - 1

TokenDType = np.dtype[np.integer[Any]]
DTYPES: dict[int, TokenDType] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
# 6 and 7 are float64/float32, swapped between Megatron-core and GPT-NeoX: never tokens.
FLOAT_CODES = (6, 7)
LENGTH_DTYPE = np.dtype("<i4")
OFFSET_DTYPE = np.dtype("<i8")


@dataclass(frozen=True)
class ShardPaths:
    """The three files of one set of shards."""

    bin: Path
    idx: Path
    json: Path

    @staticmethod
    def of(prefix: str | os.PathLike[str]) -> ShardPaths:
        """Return the files of ``prefix`` (a path without suffix; dots in it are kept)."""
        text = os.fspath(prefix)
        return ShardPaths(Path(text + ".bin"), Path(text + ".idx"), Path(text + ".json"))


@dataclass(frozen=True)
class IndexHeader:
    """The 34-byte header of ``.idx`` and what follows from it."""

    code: int
    num_sequences: int
    num_document_entries: int

    @property
    def dtype(self) -> TokenDType:
        """Dtype of the tokens in ``.bin``."""
        return DTYPES[self.code]

    @property
    def lengths_offset(self) -> int:
        """Byte offset of int32[S], tokens per sequence."""
        return HEADER.size

    @property
    def pointers_offset(self) -> int:
        """Byte offset of int64[S], where each sequence starts in ``.bin``."""
        return HEADER.size + 4 * self.num_sequences

    @property
    def documents_offset(self) -> int:
        """Byte offset of int64[D], the first sequence of each document."""
        return HEADER.size + 12 * self.num_sequences

    @property
    def size(self) -> int:
        """Bytes of the file (a multimodal file has ``num_sequences`` more)."""
        return self.documents_offset + 8 * self.num_document_entries

    def pack(self) -> bytes:
        """Return the header's 34 bytes."""
        return HEADER.pack(MAGIC, VERSION, self.code, self.num_sequences, self.num_document_entries)


def dtype_code(vocab_size: int) -> int:
    """Return the code Megatron writes: 8 (uint16) below 65,500 ids, else 4 (int32)."""
    return 8 if vocab_size < 65500 else 4


def parse_header(path: Path, head: bytes, file_size: int) -> IndexHeader:
    """Read the header and check it against the size of the file, before anything is allocated.

    Raises DataError for a wrong magic (the legacy TNTIDX by name), version, dtype code or size.
    """

    def refuse(value: object, rule: str, fix: str = "") -> DataError:
        return DataError(Problem(str(path), value, rule, fix), title="token shards")

    if head.startswith(LEGACY_MAGIC):
        raise refuse(
            "TNTIDX",
            "is the legacy Megatron/fairseq index (lazy or cached implementation), expected MMIDIDX version 1",
            "convert it with Megatron's or GPT-NeoX's preprocessing (mmap implementation), or tokenize the text again",
        )
    if not head.startswith(MAGIC):
        found = head[: len(MAGIC)]
        raise refuse(found, f"has the wrong magic, expected {MAGIC!r}", "is this a Megatron .idx file?")
    if len(head) < HEADER.size:
        raise refuse(f"{file_size} bytes", f"is cut off: the header alone has {HEADER.size} bytes", "copy it again")
    _, version, code, num_sequences, num_document_entries = HEADER.unpack(head[: HEADER.size])
    if version == VERSION << 56:
        raise refuse(
            "big-endian", "is written in big-endian numbers, expected little-endian", "tokenize the text again"
        )
    if version != VERSION:
        raise refuse(version, f"has an unknown version, expected {VERSION}")
    if code in FLOAT_CODES:
        raise refuse(f"dtype code {code}", "holds floating-point numbers, expected integer token ids")
    if code not in DTYPES:
        raise refuse(f"dtype code {code}", f"has an unknown token dtype, expected one of {sorted(DTYPES)}")
    header = IndexHeader(code, num_sequences, num_document_entries)
    if file_size not in (header.size, header.size + num_sequences):
        raise refuse(
            f"{file_size} bytes",
            f"has the wrong size: {num_sequences} sequences and {num_document_entries} document entries "
            f"need {header.size} bytes",
            "the file is cut off or damaged; copy or tokenize it again",
        )
    if num_sequences < 1 or num_document_entries < 2:
        raise refuse(
            f"{num_sequences} sequences, {num_document_entries} document entries",
            "is empty, expected at least one document",
            "remove this source or tokenize text that isn't empty",
        )
    return header
