"""One member of a source: what is known of it, and where its documents begin."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.core.errors import DataError, Problem
from trainer.data.shard_files import FileCache
from trainer.data.shard_index import HEADER, OFFSET_DTYPE, ShardPaths, TokenDType, parse_header
from trainer.data.shard_manifest import SetMember
from trainer.data.shard_paths import Member
from trainer.data.shard_reader import TokenShards
from trainer.data.shard_sidecar import SideCar, block_hash, fingerprint_of, parse_sidecar

_DATATROVE_DTYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


@dataclass(frozen=True)
class Shard:
    """A file of tokens and the facts that reading it needs."""

    path: str
    """Prefix, or path of the .ds file: what messages name."""
    tokens_path: str
    dtype: TokenDType
    num_tokens: int
    num_documents: int
    fingerprint: str
    kind: str
    vocab_size: int | None = None
    end_of_document_id: int | None = None
    tokenizer_hash: str | None = None
    notes: tuple[str, ...] = ()

    def problems(self) -> list[Problem]:
        """Return what is wrong with its documents, or with a side-car that belongs to other files."""
        files = FileCache()
        try:
            document_starts(self, files)
            self.sidecar()
        except DataError as error:
            return error.problems
        finally:
            files.close()
        return []

    def sidecar(self) -> SideCar | None:
        """Read PREFIX.json; None for shards made elsewhere. Raises DataError if it describes other tokens."""
        path = ShardPaths.of(self.path).json
        if self.kind != "megatron" or not path.exists():
            return None
        sidecar = parse_sidecar(path)
        if sidecar.fingerprint != self.fingerprint:
            rule = f"describes other files: its fingerprint must be {self.fingerprint}"
            raise _refused(str(path), sidecar.fingerprint, rule, "restore the files that belong together")
        return sidecar


def open_member(member: Member) -> Shard:
    """Open, check and describe a member of which nothing is known yet. Raises DataError."""
    if member.kind == "datatrove":
        return _open_datatrove(member.path)
    shards = TokenShards(member.path)
    try:
        return Shard(
            member.path,
            str(shards.paths.bin),
            shards.dtype,
            shards.num_tokens,
            shards.num_documents,
            shards.fingerprint,
            member.kind,
            shards.vocab_size,
            shards.end_of_document_id,
            shards.tokenizer_hash,
            shards.notes,
        )
    finally:
        shards.close()


def trust_member(member: Member, stated: SetMember) -> Shard:
    """Describe a member by what its set's manifest states, after a look at the sizes of its files.

    Raises DataError if a file is missing or has another size.
    """
    paths = ShardPaths.of(member.path)
    dtype = np.dtype(stated.dtype)
    # One sequence a document, as `trainer data` writes them: 34 bytes of header, 12 a sequence, 8 an entry.
    wanted = {
        paths.bin: stated.num_tokens * dtype.itemsize,
        paths.idx: HEADER.size + 20 * stated.num_documents + OFFSET_DTYPE.itemsize,
    }
    problems: list[Problem] = []
    for path, size in wanted.items():
        try:
            found = os.stat(path).st_size
        except OSError as error:
            problems.append(Problem(str(path), None, f"can't be read: {error.strerror}", "restore it from a copy"))
            continue
        if found != size:
            rule = f"has the wrong size: the set's manifest states {size} bytes"
            problems.append(Problem(str(path), f"{found} bytes", rule, "restore it from a copy"))
    if problems:
        raise DataError(problems, title="token shards")
    return Shard(
        member.path, str(paths.bin), dtype, stated.num_tokens, stated.num_documents, stated.fingerprint, member.kind
    )


def document_starts(shard: Shard, files: FileCache) -> NDArray[Any]:
    """Return the first token of every document and the number of tokens, [documents + 1], as small as it can be.

    Raises DataError where the index isn't in order or leaves the tokens.
    """
    read = _datatrove_starts if shard.kind == "datatrove" else _megatron_starts
    path, starts = read(shard, files)
    if starts.size != shard.num_documents + 1 or int(starts[0]) != 0 or int(starts[-1]) != shard.num_tokens:
        raise _refused(path, None, f"its documents don't cover the {shard.num_tokens} tokens", "restore it from a copy")
    if (wrong := np.flatnonzero(np.diff(starts) < 0)).size:
        rule = f"document {int(wrong[0]) + 1} begins before the one in front of it"
        raise _refused(path, int(starts[wrong[0] + 1]), rule, "restore it from a copy, or tokenize the text again")
    return starts.astype(np.uint32 if shard.num_tokens < 2**32 else np.int64)


def _megatron_starts(shard: Shard, files: FileCache) -> tuple[str, NDArray[np.int64]]:
    path = str(ShardPaths.of(shard.path).idx)
    size = os.stat(path).st_size
    head = bytearray(min(HEADER.size, size))
    files.read_into(path, memoryview(head), 0)
    header = parse_header(Path(path), bytes(head), size)
    pointers = np.empty(header.num_sequences + 1, dtype=OFFSET_DTYPE)
    files.read_into(path, pointers[:-1].view(np.uint8).data, header.pointers_offset)
    pointers[-1] = shard.num_tokens * shard.dtype.itemsize
    first_sequences = np.empty(header.num_document_entries, dtype=OFFSET_DTYPE)
    files.read_into(path, first_sequences.view(np.uint8).data, header.documents_offset)
    if int(first_sequences.min()) < 0 or int(first_sequences.max()) > header.num_sequences:
        raise _refused(path, None, "its document index names sequences that don't exist", "restore it from a copy")
    return path, pointers[first_sequences] // shard.dtype.itemsize


def _datatrove_starts(shard: Shard, files: FileCache) -> tuple[str, NDArray[np.int64]]:
    path = shard.path + ".index"
    ends = np.empty(shard.num_documents, dtype="<u8")
    files.read_into(path, ends.view(np.uint8).data, 0)
    return path, np.concatenate([np.zeros(1, dtype=np.int64), ends.astype(np.int64)])


def _open_datatrove(path: str) -> Shard:
    """Describe X.ds by X.ds.index (uint64 ends) and X.ds.metadata (``tokenizer|token size``, number of tokens)."""
    fix = "copy all of X.ds, X.ds.index and X.ds.metadata again"
    try:
        tokens_bytes, index_bytes = os.stat(path).st_size, os.stat(path + ".index").st_size
        last = int(np.fromfile(path + ".index", dtype="<u8", offset=max(0, index_bytes - 8))[-1]) if index_bytes else 0
    except OSError as error:
        raise _refused(error.filename or path, None, f"can't be read: {error.strerror}", fix) from None
    size, tokenizer = _datatrove_metadata(path, tokens_bytes, last)
    if size not in _DATATROVE_DTYPES:
        raise _refused(path, f"{size} bytes a token", "must have 2 or 4", fix)
    if index_bytes % 8 or not index_bytes or tokens_bytes != last * size or not last:
        rule = f"has the wrong size: its index ends at token {last}, {last * size} bytes"
        raise _refused(path, f"{tokens_bytes} bytes", rule, fix)
    with open(path, "rb") as file:
        sampled = [os.pread(file.fileno(), 65536, i * max(0, tokens_bytes - 65536) // 15) for i in range(16)]
    content = ["datatrove", size, last, index_bytes // 8, [block_hash(block) for block in sampled]]
    note = f"made by datatrove with {tokenizer}: vocabulary and checksums are unknown"
    return Shard(
        path, path, _DATATROVE_DTYPES[size], last, index_bytes // 8, fingerprint_of(content), "datatrove", notes=(note,)
    )


def _datatrove_metadata(path: str, tokens_bytes: int, last: int) -> tuple[int, str]:
    try:
        first = Path(path + ".metadata").read_text(encoding="utf-8").splitlines()[0]
        tokenizer, _, size = first.rpartition("|")
        return int(size), tokenizer or "an unknown tokenizer"
    except (OSError, ValueError, IndexError):
        # Without metadata the size of a token follows from the index.
        return (tokens_bytes // last if last and tokens_bytes % last == 0 else 0), "an unknown tokenizer"


def _refused(path: str, value: object, rule: str, fix: str) -> DataError:
    return DataError(Problem(path, value, rule, fix), title="token shards")
