"""PREFIX.json: what Megatron's format can't say about itself (checksums, tokenizer, vocabulary, fingerprint)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import xxhash

from trainer.core.errors import DataError, Problem

FORMAT = "trainer-token-shards"
VERSION = 1
ALGORITHM = "xxh3_64"
# Large enough that a terabyte needs 250,000 checksums (5 MB of JSON), small enough to place a flipped byte.
BLOCK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class SideCar:
    """The contents of PREFIX.json."""

    num_tokens: int
    num_documents: int
    dtype: str
    vocab_size: int
    end_of_document_id: int | None
    tokenizer_name: str | None
    tokenizer_hash: str | None
    block_bytes: int
    bin_blocks: tuple[str, ...]
    idx_hash: str
    tool_version: str
    report: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def fingerprint(self) -> str:
        """Hash of the content (dtype, counts, checksums), whatever the files are called."""
        content = [self.dtype, self.num_tokens, self.num_documents, ALGORITHM, self.block_bytes, self.idx_hash]
        return fingerprint_of([*content, list(self.bin_blocks)])

    def to_json(self) -> str:
        """Return the text of the file."""
        tokenizer = {"name": self.tokenizer_name, "hash": self.tokenizer_hash}
        blocks = {
            "bytes": self.block_bytes,
            "algorithm": ALGORITHM,
            "bin": list(self.bin_blocks),
            "idx": self.idx_hash,
        }
        value = {
            "format": FORMAT,
            "version": VERSION,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "dtype": self.dtype,
            "vocab_size": self.vocab_size,
            "end_of_document_id": self.end_of_document_id,
            "tokenizer": tokenizer,
            "fingerprint": self.fingerprint,
            "tool_version": self.tool_version,
            "report": self.report,
            "blocks": blocks,
        }
        return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def fingerprint_of(content: list[Any]) -> str:
    """Return 32 hex digits for a list of JSON values."""
    return hashlib.blake2b(json.dumps(content, separators=(",", ":")).encode(), digest_size=16).hexdigest()


def parse_sidecar(path: Path) -> SideCar:
    """Read PREFIX.json.

    Raises DataError if it isn't ours, is damaged, or its fingerprint doesn't follow from its contents.
    """

    def refuse(value: object, rule: str, fix: str = "") -> DataError:
        return DataError(Problem(str(path), value, rule, fix), title="token shards")

    restore = "restore it, or remove it to use the shards without checksums"
    try:
        loaded: Any = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise refuse(None, f"can't be read: {error}", restore) from None
    if not isinstance(loaded, dict):
        raise refuse(type(loaded).__name__, "isn't a JSON object", restore)
    raw = cast("dict[str, Any]", loaded)
    if raw.get("format") != FORMAT:
        raise refuse(raw.get("format"), f"isn't the side-car of token shards: `format` must be {FORMAT!r}", restore)
    if raw.get("version") != VERSION:
        raise refuse(raw.get("version"), f"has an unknown version, expected {VERSION}", "upgrade trainer")
    try:
        sidecar = _from_dict(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise refuse(None, f"lacks a field or has one of the wrong type: {error}", restore) from None
    if sidecar.fingerprint != raw.get("fingerprint"):
        raise refuse(raw.get("fingerprint"), "its fingerprint doesn't follow from its contents: it was edited", restore)
    return sidecar


def _integer(raw: dict[str, Any], key: str, minimum: int) -> int:
    value = raw[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{key} = {value!r}")
    return value


def _from_dict(raw: dict[str, Any]) -> SideCar:
    blocks: dict[str, Any] = raw["blocks"]
    tokenizer: dict[str, Any] = raw.get("tokenizer") or {}
    if blocks["algorithm"] != ALGORITHM:
        raise ValueError(f"blocks.algorithm = {blocks['algorithm']!r}")
    return SideCar(
        num_tokens=_integer(raw, "num_tokens", 1),
        num_documents=_integer(raw, "num_documents", 1),
        dtype=str(raw["dtype"]),
        vocab_size=_integer(raw, "vocab_size", 1),
        end_of_document_id=None if raw["end_of_document_id"] is None else _integer(raw, "end_of_document_id", 0),
        tokenizer_name=tokenizer.get("name"),
        tokenizer_hash=tokenizer.get("hash"),
        block_bytes=_integer(blocks, "bytes", 1),
        bin_blocks=tuple(str(block) for block in blocks["bin"]),
        idx_hash=str(blocks["idx"]),
        tool_version=str(raw.get("tool_version", "")),
        report=dict(raw.get("report") or {}),
    )


def block_hash(data: bytes | memoryview) -> str:
    """Return the checksum of one block, 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(data)


def stream_hash(file: BinaryIO) -> str:
    """Return the checksum of everything from the file's position on, in constant memory."""
    digest = xxhash.xxh3_64()
    while chunk := file.read(BLOCK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


class BlockHasher:
    """Checksums of consecutive blocks of a stream that arrives in pieces of any size."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._digest = xxhash.xxh3_64()
        self._filled = 0
        self._blocks: list[str] = []

    def update(self, data: memoryview) -> None:
        """Take the next bytes of the stream (a contiguous view of bytes)."""
        for piece in self._pieces(data):
            self._digest.update(piece)
            self._filled += len(piece)
            if self._filled == self._block_bytes:
                self._finish_block()

    def blocks(self) -> tuple[str, ...]:
        """End the stream and return one checksum a block; the last block may be shorter."""
        if self._filled:
            self._finish_block()
        return tuple(self._blocks)

    def _pieces(self, data: memoryview) -> Iterator[memoryview]:
        while len(data):
            room = self._block_bytes - self._filled
            yield data[:room]
            data = data[room:]

    def _finish_block(self) -> None:
        self._blocks.append(self._digest.hexdigest())
        self._digest.reset()
        self._filled = 0
