"""Write token shards as a stream: constant memory in the number of documents, visible only when complete."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from trainer.core.durable import fsync_directory
from trainer.core.errors import DataError, Problem
from trainer.data.shard_index import (
    HEADER,
    LENGTH_DTYPE,
    MAX_SEQUENCE_TOKENS,
    OFFSET_DTYPE,
    IndexHeader,
    ShardPaths,
    dtype_code,
)
from trainer.data.shard_sidecar import BLOCK_BYTES, BlockHasher, SideCar, stream_hash

# Entries of the index that are turned from lengths into offsets at a time.
_INDEX_CHUNK = 1 << 18


@dataclass(frozen=True)
class WriterState:
    """How far a writer is on disk, for another process to go on from."""

    num_documents: int
    num_tokens: int
    bin_hash: str
    """xxh3_64 of the .bin so far."""
    lengths_hash: str
    """xxh3_64 of the lengths in the .idx so far."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: the arguments of the constructor."""
        return asdict(self)


class CannotContinueError(Exception):
    """The partial files aren't those that a WriterState describes. They are left as they are."""


class ShardWriter:
    """Write PREFIX.bin, PREFIX.idx and PREFIX.json, one sequence a document.

    Files are written as ``*.partial`` beside their final names, synced, then renamed, PREFIX.json last. A killed
    writer leaves only ``*.partial``, which the next writer of the same prefix takes over: empties, or with
    ``continue_from`` cuts back to what ``sync`` returned once (CannotContinueError if they don't fit). A lock keeps
    two writers apart. ``resumable`` keeps the partial files when the disk fails. ``end_of_document_id`` is promised to
    end every document: one that doesn't is refused.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        vocab_size: int,
        *,
        end_of_document_id: int | None = None,
        tokenizer_name: str | None = None,
        tokenizer_hash: str | None = None,
        overwrite: bool = False,
        block_bytes: int = BLOCK_BYTES,
        resumable: bool = False,
        continue_from: WriterState | None = None,
    ) -> None:
        self.prefix = os.fspath(prefix)
        self._paths = ShardPaths.of(prefix)
        if not 1 <= vocab_size <= 2**31:
            self._refuse("vocab_size", vocab_size, "must be between 1 and 2^31")
        if end_of_document_id is not None and not 0 <= end_of_document_id < vocab_size:
            self._refuse("end_of_document_id", end_of_document_id, f"must be an id below vocab_size = {vocab_size}")
        self.num_documents = 0
        self.num_tokens = 0
        self._vocab_size = vocab_size
        self._end_of_document_id = end_of_document_id
        self._tokenizer = (tokenizer_name, tokenizer_hash)
        self._overwrite = overwrite
        self._resumable = resumable
        self._block_bytes = block_bytes
        self._code = dtype_code(vocab_size)
        self._dtype = IndexHeader(self._code, 0, 0).dtype
        self._hasher = BlockHasher(block_bytes)
        self._bin_hash, self._lengths_hash = xxhash.xxh3_64(), xxhash.xxh3_64()
        self._closed = False
        # What this writer has opened and locked, and may therefore remove.
        self._own: list[tuple[Path, BinaryIO]] = []
        self._check_target()
        try:
            self._paths.bin.parent.mkdir(parents=True, exist_ok=True)
            self._bin = self._open_partial(self._paths.bin, keep=continue_from is not None)
            self._idx = self._open_partial(self._paths.idx, keep=continue_from is not None)
            if continue_from is None:
                self._idx.write(bytes(HEADER.size))
            else:
                self._continue(continue_from)
        except OSError as error:
            self.abort()
            self._refuse(self.prefix, None, f"can't be written: {error.strerror}", cause=error)

    def add(self, tokens: Sequence[int] | NDArray[Any]) -> None:
        """Append one document. Raises DataError for ids < 0 or >= vocab_size and for an empty document."""
        array = self._as_ids(tokens)
        self.add_many(array, np.array([array.size], dtype=np.int64))

    def add_many(self, tokens: Sequence[int] | NDArray[Any], lengths: Sequence[int] | NDArray[Any]) -> None:
        """Append documents that lie end to end in ``tokens``; ``lengths`` are their numbers of tokens."""
        ids, sizes = self._as_ids(tokens), np.asarray(lengths, dtype=np.int64)
        if sizes.size == 0:
            return
        self._check(ids, sizes)
        stored = np.ascontiguousarray(ids, dtype=self._dtype)
        view = stored.view(np.uint8).data
        lengths_bytes = sizes.astype(LENGTH_DTYPE).tobytes()
        try:
            self._bin.write(view)
            self._idx.write(lengths_bytes)
        except OSError as error:
            self.abort(self._resumable)
            self._refuse(self.prefix, None, f"can't be written: {error.strerror}", cause=error)
        self._hasher.update(view)
        self._bin_hash.update(view)
        self._lengths_hash.update(lengths_bytes)
        self.num_tokens += ids.size
        self.num_documents += sizes.size

    def sync(self) -> WriterState:
        """Make everything so far survive a power cut, and return where another process can go on."""
        try:
            _sync(self._bin)
            _sync(self._idx)
        except OSError as error:
            self._refuse(self.prefix, None, f"can't be written: {error.strerror}", cause=error)
        return WriterState(
            self.num_documents, self.num_tokens, self._bin_hash.hexdigest(), self._lengths_hash.hexdigest()
        )

    def commit(self, report: dict[str, Any] | None = None) -> SideCar:
        """Finish the index, sync everything, rename it into place and return the side-car.

        Raises DataError if no document was added or the disk fails; then nothing is left behind.
        """
        return self._finish(report, rename=True)

    def finish(self, report: dict[str, Any] | None = None) -> SideCar:
        """Do what ``commit`` does, but leave the complete files as ``*.partial`` for ``publish``."""
        return self._finish(report, rename=False)

    def _finish(self, report: dict[str, Any] | None, rename: bool) -> SideCar:
        if self._closed:
            raise ValueError("this writer is closed")
        try:
            if not self.num_documents:
                self._refuse(self.prefix, 0, "no document was added", "give it text that isn't empty")
            self._check_target()
            self._finish_index()
            sidecar = self._sidecar(report or {})
            file = self._open_partial(self._paths.json)
            file.write(sidecar.to_json().encode())
            _sync(file)
            if rename:
                publish(self.prefix)
            self._closed = True
        except OSError as error:
            self.abort(self._resumable)
            self._refuse(self.prefix, None, f"can't be written: {error.strerror}", cause=error)
        finally:
            self.abort()
        for _, file in self._own:
            file.close()
        return sidecar

    def abort(self, keep: bool = False) -> None:
        """Remove what is not committed, or ``keep`` it for a writer that continues. Harmless after ``commit``."""
        if self._closed:
            return
        self._closed = True
        # Unlinked before closed: closing gives up the lock, and the name may then be another writer's.
        for path, file in reversed(self._own):
            if not keep:
                path.unlink(missing_ok=True)
            with suppress(OSError):  # a full disk fails again on the last flush
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None and not self._closed:
            self.commit()
        self.abort()

    def _continue(self, state: WriterState) -> None:
        """Cut the partial files back to ``state`` and take its place."""
        bin_bytes = state.num_tokens * self._dtype.itemsize
        idx_bytes = HEADER.size + state.num_documents * LENGTH_DTYPE.itemsize
        for piece in _pieces(self._bin, 0, bin_bytes):
            self._hasher.update(memoryview(piece))
            self._bin_hash.update(piece)
        for piece in _pieces(self._idx, HEADER.size, idx_bytes):
            self._lengths_hash.update(piece)
        if (self._bin_hash.hexdigest(), self._lengths_hash.hexdigest()) != (state.bin_hash, state.lengths_hash):
            self.abort(keep=True)
            raise CannotContinueError(f"{self.prefix}: the partial files aren't those that were written")
        for file, size in ((self._bin, bin_bytes), (self._idx, idx_bytes)):
            file.truncate(size)
            file.seek(size)
        self.num_documents, self.num_tokens = state.num_documents, state.num_tokens

    def _check_target(self) -> None:
        for path in (self._paths.bin, self._paths.idx, self._paths.json):
            if path.is_dir():
                self._refuse(str(path), "a directory", "must be a file", "choose another output prefix")
            if path.exists() and not self._overwrite:
                self._refuse(str(path), None, "exists already", "choose another output prefix, or pass --overwrite")

    def _as_ids(self, tokens: Sequence[int] | NDArray[Any]) -> NDArray[np.integer[Any]]:
        try:
            array = np.asarray(tokens)
        except (OverflowError, ValueError) as error:
            self._refuse(f"document {self.num_documents}", None, f"isn't a list of token ids: {error}")
        if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
            self._refuse(
                f"document {self.num_documents}",
                f"{array.dtype}{list(array.shape)}",
                "must be a flat list of integer token ids",
            )
        return array if array.size else array.astype(np.int64)

    def _check(self, ids: NDArray[np.integer[Any]], sizes: NDArray[np.int64]) -> None:
        first = self.num_documents
        if (wrong := np.flatnonzero((sizes < 1) | (sizes > MAX_SEQUENCE_TOKENS))).size:
            document, size = first + int(wrong[0]), int(sizes[wrong[0]])
            self._refuse(f"document {document}", f"{size} tokens", f"must have 1 to {MAX_SEQUENCE_TOKENS} tokens")
        ends = np.cumsum(sizes)
        if int(ends[-1]) != ids.size:
            raise ValueError(f"lengths add up to {int(ends[-1])}, but there are {ids.size} tokens")
        if int(ids.min()) < 0 or int(ids.max()) >= self._vocab_size:
            place = int(np.flatnonzero((ids < 0) | (ids >= self._vocab_size))[0])
            document = first + int(np.searchsorted(ends, place, side="right"))
            self._refuse(
                f"document {document}",
                int(ids[place]),
                f"has a token id outside 0..{self._vocab_size - 1}",
                "the tokenizer and the declared vocabulary size don't match",
            )
        if self._end_of_document_id is not None:
            last = ids[ends - 1]
            if (open_ended := np.flatnonzero(last != self._end_of_document_id)).size:
                self._refuse(
                    f"document {first + int(open_ended[0])}",
                    int(last[open_ended[0]]),
                    f"must end with the end-of-document id {self._end_of_document_id}",
                )

    def _finish_index(self) -> None:
        """Append offsets and the document index behind the lengths that are already in the file."""
        header = IndexHeader(self._code, self.num_documents, self.num_documents + 1)
        self._idx.flush()
        descriptor = self._idx.fileno()
        offset = 0
        for start in range(0, self.num_documents, _INDEX_CHUNK):
            count = min(_INDEX_CHUNK, self.num_documents - start)
            raw = os.pread(descriptor, count * LENGTH_DTYPE.itemsize, header.lengths_offset + start * 4)
            sizes = np.frombuffer(raw, dtype=LENGTH_DTYPE).astype(np.int64) * self._dtype.itemsize
            ends = offset + np.cumsum(sizes)
            self._idx.write((ends - sizes).astype(OFFSET_DTYPE).tobytes())
            offset = int(ends[-1])
        for start in range(0, self.num_documents + 1, _INDEX_CHUNK):
            entries = np.arange(start, min(start + _INDEX_CHUNK, self.num_documents + 1), dtype=OFFSET_DTYPE)
            self._idx.write(entries.tobytes())
        self._idx.seek(0)
        self._idx.write(header.pack())
        _sync(self._idx)
        _sync(self._bin)

    def _sidecar(self, report: dict[str, Any]) -> SideCar:
        with open(partial_path(self._paths.idx), "rb") as file:
            idx_hash = stream_hash(file)
        return SideCar(
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            dtype=self._dtype.name,
            vocab_size=self._vocab_size,
            end_of_document_id=self._end_of_document_id,
            tokenizer_name=self._tokenizer[0],
            tokenizer_hash=self._tokenizer[1],
            block_bytes=self._block_bytes,
            bin_blocks=self._hasher.blocks(),
            idx_hash=idx_hash,
            tool_version=tool_version(),
            report=report,
        )

    def _open_partial(self, path: Path, keep: bool = False) -> BinaryIO:
        try:
            file = open_locked(partial_path(path))
        except BlockingIOError:
            self.abort(keep)
            self._refuse(
                str(partial_path(path)), None, "is being written by another process", "wait for it, or stop it"
            )
        self._own.append((partial_path(path), file))
        if not keep:
            file.truncate(0)
        return file

    def _refuse(self, key: str, value: Any, rule: str, fix: str = "", cause: Exception | None = None) -> NoReturn:
        raise DataError(Problem(key, value, rule, fix), title=f"writing {self.prefix}") from cause


def publish(prefix: str | os.PathLike[str]) -> None:
    """Rename the complete ``*.partial`` files of ``prefix``, PREFIX.json last. Interrupted, it can be called again.

    Raises OSError.
    """
    paths = ShardPaths.of(prefix)
    if partial_path(paths.bin).exists():
        # Old index and side-car go first: an interruption leaves shards that are refused, never a mixture.
        paths.json.unlink(missing_ok=True)
        paths.idx.unlink(missing_ok=True)
    for path in (paths.bin, paths.idx, paths.json):
        if partial_path(path).exists() or not path.exists():
            os.replace(partial_path(path), path)
    fsync_directory(paths.bin.parent)


def partial_path(path: Path) -> Path:
    """Return the name of ``path`` while it is written."""
    return path.with_name(path.name + ".partial")


def open_locked(path: Path) -> BinaryIO:
    """Open or create ``path`` for reading and writing, and lock it. Raises BlockingIOError if it is locked."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=1 << 20)
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        except OSError:
            pass  # a file system without locks: this check is lost, nothing else
        # Its last owner may have renamed it between our open and our lock: then it isn't ours to empty.
        if _same_file(file, path):
            return file
        file.close()


def _same_file(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _pieces(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    """Yield the bytes of a file; fewer if it is shorter."""
    file.seek(start)
    while start < stop and (piece := file.read(min(BLOCK_BYTES, stop - start))):
        yield piece
        start += len(piece)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def tool_version() -> str:
    """Return the version of this package."""
    try:
        return version("trainer")
    except PackageNotFoundError:  # run from a checkout that isn't installed
        return "unknown"
