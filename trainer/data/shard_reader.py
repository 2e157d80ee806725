"""Read token shards: opening costs a few small reads, whatever their size."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from trainer.core.errors import DataError, Problem
from trainer.data.shard_index import HEADER, LENGTH_DTYPE, OFFSET_DTYPE, ShardPaths, TokenDType, parse_header
from trainer.data.shard_sidecar import BLOCK_BYTES, block_hash, fingerprint_of, parse_sidecar, stream_hash

# Blocks of .bin that stand for its content in the fingerprint of shards without a side-car.
_FOREIGN_BLOCKS = 16


class TokenShards:
    """The tokens of PREFIX.bin as one stream, cut into documents by PREFIX.idx.

    Bytes are read with pread into arrays of the caller's, never mapped: no view can outlive the object, and a file
    that shrinks under a running job is an error message instead of SIGBUS. Safe to use from several threads.

    Opening checks header, file sizes, the last entries of the index and the side-car; ``verify`` checks the rest.
    Raises DataError with every problem found.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self.paths = ShardPaths.of(prefix)
        self._bin = self._open()
        bin_bytes = os.fstat(self._bin.fileno()).st_size
        with _open_regular(self.paths.idx) as idx:
            self.idx_bytes = os.fstat(idx.fileno()).st_size
            self.header = parse_header(self.paths.idx, os.pread(idx.fileno(), HEADER.size, 0), self.idx_bytes)
            self._check_ends(idx.fileno(), bin_bytes)
        self.dtype: TokenDType = self.header.dtype
        self.num_tokens = bin_bytes // self.dtype.itemsize
        self.num_documents = self.header.num_document_entries - 1
        self.sidecar = parse_sidecar(self.paths.json) if self.paths.json.exists() else None
        self._fingerprint: str | None = None
        self._check_sidecar()

    @property
    def vocab_size(self) -> int | None:
        """Number of ids of the tokenizer that wrote the shards; None without a side-car."""
        return self.sidecar.vocab_size if self.sidecar else None

    @property
    def end_of_document_id(self) -> int | None:
        """Id that ends every document; None if unknown."""
        return self.sidecar.end_of_document_id if self.sidecar else None

    @property
    def tokenizer_hash(self) -> str | None:
        """``tokenizer_hash`` of the tokenizer that wrote the shards; None if unknown."""
        return self.sidecar.tokenizer_hash if self.sidecar else None

    @property
    def fingerprint(self) -> str:
        """Hash of the content, independent of the path.

        Without a side-car it covers sizes, the index and 16 blocks of ``.bin``: reading them takes a moment.
        """
        if self._fingerprint is None:
            self._fingerprint = self.sidecar.fingerprint if self.sidecar else self._sampled_fingerprint()
        return self._fingerprint

    def _sampled_fingerprint(self) -> str:
        with _open_regular(self.paths.idx) as idx:
            idx_hash = stream_hash(idx)
        bin_bytes = self.num_tokens * self.dtype.itemsize
        sampled = [
            [block, block_hash(self.read_bytes(block * BLOCK_BYTES, BLOCK_BYTES))]
            for block in sampled_blocks(-(-bin_bytes // BLOCK_BYTES), _FOREIGN_BLOCKS)
        ]
        return fingerprint_of(["sampled", self.dtype.name, self.num_tokens, self.num_documents, idx_hash, sampled])

    @property
    def notes(self) -> tuple[str, ...]:
        """What can't be checked about these shards, one sentence each."""
        notes: list[str] = []
        if self.sidecar is None:
            notes.append(
                f"{self.paths.json.name} is missing (shards made elsewhere?): tokenizer, vocabulary and "
                "end-of-document id are unknown, and damage inside .bin can't be detected"
            )
        if self.idx_bytes != self.header.size:
            notes.append("the index is multimodal: modes are ignored and every token is read as text")
        return tuple(notes)

    def read(self, start_token: int, count: int) -> NDArray[np.integer[Any]]:
        """Return ``count`` tokens of the stream from ``start_token`` on, as a new array [count] of ``dtype``.

        Raises DataError if the range leaves the stream or the file has become shorter.
        """
        if start_token < 0 or count < 0 or start_token + count > self.num_tokens:
            raise self._refuse(
                self.paths.bin,
                f"tokens {start_token}..{start_token + count}",
                f"asks for tokens outside 0..{self.num_tokens}",
            )
        tokens = np.empty(count, dtype=self.dtype)
        self._read_into(self._bin, self.paths.bin, tokens.view(np.uint8).data, start_token * self.dtype.itemsize)
        return tokens

    def documents(self, index: int) -> NDArray[np.integer[Any]]:
        """Return the tokens of one document as a new array [tokens]."""
        if not 0 <= index < self.num_documents:
            raise self._refuse(
                self.paths.idx, f"document {index}", f"asks for a document outside 0..{self.num_documents}"
            )
        with _open_regular(self.paths.idx) as idx:
            first, stop = (int(i) for i in self._index_entries(idx, self.header.documents_offset, index, 2))
            if not 0 <= first <= stop <= self.header.num_sequences:
                raise self._refuse(self.paths.idx, [first, stop], f"its document index is damaged at entry {index}")
            start = self._start_token(idx, first)
            return self.read(start, self._start_token(idx, stop) - start)

    def read_bytes(self, offset: int, count: int) -> bytes:
        """Return up to ``count`` bytes of ``.bin`` (fewer only at its end)."""
        count = max(0, min(count, self.num_tokens * self.dtype.itemsize - offset))
        data = bytearray(count)
        self._read_into(self._bin, self.paths.bin, memoryview(data), offset)
        return bytes(data)

    def close(self) -> None:
        """Close the file; arrays that were read stay valid."""
        self._bin.close()

    def _start_token(self, idx: BinaryIO, sequence: int) -> int:
        if sequence == self.header.num_sequences:
            return self.num_tokens
        return int(self._index_entries(idx, self.header.pointers_offset, sequence, 1)[0]) // self.dtype.itemsize

    def _index_entries(self, idx: BinaryIO, offset: int, first: int, count: int) -> NDArray[np.int64]:
        entries = np.empty(count, dtype=OFFSET_DTYPE)
        self._read_into(idx, self.paths.idx, entries.view(np.uint8).data, offset + first * OFFSET_DTYPE.itemsize)
        return entries

    def _read_into(self, file: BinaryIO, path: Path, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):  # one read returns at most 2 GiB
            got = os.preadv(file.fileno(), [view[done:]], offset + done)
            if got == 0:
                raise self._refuse(
                    path,
                    f"{offset + done} bytes",
                    f"has become shorter: expected at least {offset + len(view)} bytes",
                    "was it replaced while in use? restore it and start again",
                )
            done += got

    def _open(self) -> BinaryIO:
        problems: list[Problem] = []
        for path in (self.paths.bin, self.paths.idx):
            try:
                _open_regular(path).close()
            except DataError as error:
                problems += error.problems
        if problems:
            if self.prefix.endswith((".bin", ".idx", ".json")):
                problems.append(
                    Problem(
                        "prefix", self.prefix, "has a suffix", f"give the prefix: {Path(self.prefix).with_suffix('')}"
                    )
                )
            raise DataError(problems, title="token shards")
        return _open_regular(self.paths.bin)

    def _check_ends(self, descriptor: int, bin_bytes: int) -> None:
        header, problems = self.header, list[Problem]()

        def entry(offset: int, dtype: np.dtype[Any]) -> int:
            return int(np.frombuffer(os.pread(descriptor, dtype.itemsize, offset), dtype=dtype)[0])

        def refuse(path: Path, value: object, rule: str) -> None:
            problems.append(Problem(str(path), value, rule, "copy it again or tokenize the text again"))

        last_length = entry(header.pointers_offset - LENGTH_DTYPE.itemsize, LENGTH_DTYPE)
        first_pointer = entry(header.pointers_offset, OFFSET_DTYPE)
        last_pointer = entry(header.documents_offset - OFFSET_DTYPE.itemsize, OFFSET_DTYPE)
        first_document = entry(header.documents_offset, OFFSET_DTYPE)
        last_document = entry(header.size - OFFSET_DTYPE.itemsize, OFFSET_DTYPE)
        if first_pointer != 0:
            refuse(self.paths.idx, first_pointer, "its first sequence starts past the beginning of .bin, expected 0")
        if (first_document, last_document) != (0, header.num_sequences):
            found = [first_document, last_document]
            refuse(self.paths.idx, found, f"its document index must run from 0 to {header.num_sequences}")
        expected = last_pointer + last_length * header.dtype.itemsize
        if last_length < 0 or last_pointer < 0 or expected != bin_bytes:
            refuse(self.paths.bin, f"{bin_bytes} bytes", f"has the wrong size: the index ends at byte {expected}")
        elif bin_bytes == 0:
            refuse(self.paths.bin, "0 bytes", "is empty, expected at least one token")
        if problems:
            raise DataError(problems, title="token shards")

    def _check_sidecar(self) -> None:
        if self.sidecar is None:
            return
        found: dict[str, object] = {
            "num_tokens": self.sidecar.num_tokens,
            "num_documents": self.sidecar.num_documents,
            "dtype": self.sidecar.dtype,
            "blocks.bin": len(self.sidecar.bin_blocks),
        }
        expected: dict[str, object] = {
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "dtype": self.dtype.name,
            "blocks.bin": -(-self.num_tokens * self.dtype.itemsize // self.sidecar.block_bytes),
        }
        problems = [
            Problem(
                f"{self.paths.json}: {key}",
                found[key],
                f"describes other files: .bin and .idx have {expected[key]!r}",
                "restore the matching side-car, or remove it to use the shards without checksums",
            )
            for key in found
            if found[key] != expected[key]
        ]
        if problems:
            raise DataError(problems, title="token shards")

    def _refuse(self, path: Path, value: object, rule: str, fix: str = "") -> DataError:
        return DataError(Problem(str(path), value, rule, fix), title="token shards")


def sampled_blocks(num_blocks: int, count: int) -> list[int]:
    """Return at most ``count`` block numbers, evenly spaced, the first and the last among them."""
    if num_blocks <= count:
        return list(range(num_blocks))
    return [i * (num_blocks - 1) // (count - 1) for i in range(count)]


def _open_regular(path: Path) -> BinaryIO:
    if path.is_dir():
        raise DataError(Problem(str(path), "a directory", "must be a file"), title="token shards")
    try:
        if path.exists() and not path.is_file():  # a FIFO would block, a device never ends
            raise DataError(Problem(str(path), None, "must be a regular file"), title="token shards")
        return open(path, "rb", buffering=0)
    except FileNotFoundError:
        fix = "give the path of PREFIX.bin without .bin"
        raise DataError(Problem(str(path), None, "doesn't exist", fix), title="token shards") from None
    except OSError as error:
        raise DataError(Problem(str(path), None, f"can't be read: {error.strerror}"), title="token shards") from None
