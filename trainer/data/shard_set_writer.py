"""Write a source as one prefix, or as a set of shards of a bounded size."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from trainer.core.durable import fsync_directory
from trainer.core.errors import DataError, Problem
from trainer.data.shard_index import IndexHeader, ShardPaths, dtype_code
from trainer.data.shard_manifest import SetManifest, SetMember, member_name
from trainer.data.shard_paths import read_manifest
from trainer.data.shard_sidecar import SideCar
from trainer.data.shard_writer import (
    CannotContinueError,
    ShardWriter,
    WriterState,
    open_locked,
    partial_path,
    publish,
    tool_version,
)


@dataclass(frozen=True)
class Written:
    """What was committed."""

    num_documents: int
    num_tokens: int
    fingerprint: str


@dataclass(frozen=True)
class SetState:
    """How far a SetWriter is on disk."""

    members: tuple[SetMember, ...]
    """Complete ones, in order."""
    current: WriterState
    """The one after them."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"members": [asdict(member) for member in self.members], "current": self.current.to_dict()}

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> SetState:
        """Return what ``to_dict`` came from. Raises KeyError or TypeError."""
        return SetState(tuple(SetMember(**member) for member in raw["members"]), WriterState(**raw["current"]))


@dataclass(frozen=True)
class Finished:
    """Complete files that still have to be renamed."""

    prefix: str
    members: tuple[str, ...] | None
    """Names of the shards of a set; None: one prefix."""
    replaced: tuple[str, ...]
    """Names of shards of an older set that go."""
    written: Written


class SetWriter:
    """Write documents to PREFIX, or with ``shard_bytes`` to PREFIX-00000, PREFIX-00001, … and PREFIX.json.

    A shard's .bin stays within ``shard_bytes`` unless a single document is larger; documents are never split. All
    files are ``*.partial`` until the whole is complete. PREFIX.json comes last: without it the members are no source.
    Without ``shard_bytes`` the files are those of ShardWriter, byte for byte. ``continue_from`` takes the partial
    files of another process over; CannotContinueError if they don't fit. ``resumable`` keeps them when the disk fails.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        vocab_size: int,
        *,
        shard_bytes: int | None = None,
        overwrite: bool = False,
        end_of_document_id: int | None = None,
        tokenizer_name: str | None = None,
        tokenizer_hash: str | None = None,
        resumable: bool = False,
        continue_from: SetState | None = None,
    ) -> None:
        self.prefix = os.fspath(prefix)
        self._shard_bytes = shard_bytes
        self._vocab_size, self._overwrite = vocab_size, overwrite
        self._end_of_document_id = end_of_document_id
        self._tokenizer = (tokenizer_name, tokenizer_hash)
        self._dtype = IndexHeader(dtype_code(vocab_size), 0, 0).dtype
        self._resumable = resumable
        self._members = list(continue_from.members) if continue_from else []
        self._closed = False
        self._lock: BinaryIO | None = None
        self._check_target()
        if shard_bytes is not None:
            self._take_lock()
        try:
            if continue_from:
                self._check_members()
            if shard_bytes is not None:
                kept = {*(member.name for member in self._members), *([self._next_name()] if continue_from else [])}
                remove_partials(self.prefix, kept)
            self._current = self._open(continue_from.current if continue_from else None)
        except BaseException:
            self._release(keep=continue_from is not None)
            raise

    @property
    def num_shards(self) -> int:
        """Complete shards so far, without the one being written."""
        return len(self._members)

    @property
    def num_documents(self) -> int:
        """Documents so far."""
        return sum(member.num_documents for member in self._members) + self._current.num_documents

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return sum(member.num_tokens for member in self._members) + self._current.num_tokens

    def add(self, tokens: Sequence[int] | NDArray[Any]) -> None:
        """Append one document. See ShardWriter."""
        array = np.asarray(tokens)
        self.add_many(array, np.array([array.size], dtype=np.int64))

    def add_many(self, tokens: NDArray[Any], lengths: NDArray[np.int64]) -> None:
        """Append documents that lie end to end in ``tokens``. See ShardWriter."""
        if self._shard_bytes is None:
            self._current.add_many(tokens, lengths)
            return
        ends = np.cumsum(lengths)
        first = token = 0
        while first < lengths.size:
            room = self._shard_bytes // self._dtype.itemsize - self._current.num_tokens
            fitting = int(np.searchsorted(ends, token + room, side="right")) - first
            if fitting <= 0 and self._current.num_documents:
                self._finish_member()
                self._current = self._open(None)
                continue
            stop = first + max(1, fitting)
            upto = int(ends[stop - 1])
            self._current.add_many(tokens[token:upto], lengths[first:stop])
            first, token = stop, upto

    def sync(self) -> SetState:
        """Make everything so far survive a power cut, and return where another process can go on."""
        return SetState(tuple(self._members), self._current.sync())

    def finish(self, report: dict[str, Any] | None = None) -> Finished:
        """Complete the files, still as ``*.partial``. Raises DataError if no document was added or the disk fails."""
        if self._shard_bytes is None:
            manifest = read_manifest(Path(self.prefix + ".json"))
            side = self._current.finish(report)
            self._closed = True
            replaced = tuple(member.name for member in manifest.members) if manifest else ()
            written = Written(side.num_documents, side.num_tokens, side.fingerprint)
            return Finished(self.prefix, None, replaced, written)
        self._finish_member()
        names = tuple(member.name for member in self._members)
        manifest = SetManifest(
            tuple(self._members),
            self._vocab_size,
            self._end_of_document_id,
            *self._tokenizer,
            tool_version(),
            report or {},
        )
        assert self._lock is not None
        try:
            self._lock.write(manifest.to_json().encode())
            self._lock.flush()
            os.fsync(self._lock.fileno())
        except OSError as error:
            self.abort(keep=self._resumable)
            raise self._refused(f"can't be written: {error.strerror}") from error
        self._closed = True
        documents = sum(member.num_documents for member in self._members)
        tokens = sum(member.num_tokens for member in self._members)
        replaced = tuple(sorted(_members_on_disk(self.prefix, "").difference(names)))
        return Finished(self.prefix, names, replaced, Written(documents, tokens, manifest.fingerprint))

    def commit(self, report: dict[str, Any] | None = None) -> Written:
        """Finish the files and rename them, PREFIX.json last. Raises DataError, and leaves nothing, as ``finish``."""
        finished = self.finish(report)
        publish_set(finished)
        self.close()
        return finished.written

    def close(self) -> None:
        """Give up the lock after ``finish`` and ``publish_set``."""
        if self._lock is not None:
            self._lock.close()

    def abort(self, keep: bool = False) -> None:
        """Remove what was written, or ``keep`` it for a writer that continues. Harmless after ``finish``."""
        if self._closed:
            return
        self._current.abort(keep)
        self._release(keep)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.abort()

    def _check_target(self) -> None:
        """Raise DataError for an existing output without ``overwrite``. One prefix is checked by its ShardWriter."""
        paths = ShardPaths.of(self.prefix)
        existing = [path for path in (paths.json, paths.idx, paths.bin) if path.exists()]
        if self._shard_bytes is not None:
            names = sorted(_members_on_disk(self.prefix, ""))
            existing += [paths.bin.with_name(f"{name}.bin") for name in names[:1]]
        if existing and not self._overwrite:
            fix = "choose another output prefix, or pass --overwrite"
            raise DataError(Problem(str(existing[0]), None, "exists already", fix), title=f"writing {self.prefix}")

    def _take_lock(self) -> None:
        """Hold PREFIX.json.partial, which becomes the manifest: shards that are complete aren't locked themselves."""
        path = partial_path(ShardPaths.of(self.prefix).json)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = open_locked(path)
            self._lock.truncate(0)
        except BlockingIOError:
            problem = Problem(str(path), None, "is being written by another process", "wait for it, or stop it")
            raise DataError(problem, title=f"writing {self.prefix}") from None
        except OSError as error:
            raise self._refused(f"can't be written: {error.strerror}") from error

    def _release(self, keep: bool) -> None:
        self._closed = True
        if self._lock is None:
            return
        if not keep:
            remove_partials(self.prefix)
        with suppress(OSError):
            self._lock.close()

    def _check_members(self) -> None:
        for member in self._members:
            paths = ShardPaths.of(Path(self.prefix).with_name(member.name))
            header = IndexHeader(dtype_code(self._vocab_size), member.num_documents, member.num_documents + 1)
            expected = {paths.bin: member.num_tokens * self._dtype.itemsize, paths.idx: header.size, paths.json: None}
            for path, size in expected.items():
                partial = partial_path(path)
                if not partial.exists() or size not in (None, partial.stat().st_size):
                    raise CannotContinueError(f"{partial} is missing or has another size")

    def _next_name(self) -> str:
        return member_name(self.prefix, len(self._members))

    def _open(self, state: WriterState | None) -> ShardWriter:
        prefix = Path(self.prefix)
        if self._shard_bytes is not None:
            prefix = prefix.with_name(self._next_name())
        return ShardWriter(
            prefix,
            self._vocab_size,
            end_of_document_id=self._end_of_document_id,
            tokenizer_name=self._tokenizer[0],
            tokenizer_hash=self._tokenizer[1],
            overwrite=self._overwrite,
            resumable=self._resumable,
            continue_from=state,
        )

    def _finish_member(self) -> None:
        try:
            side: SideCar = self._current.finish()
        except DataError as error:
            self.abort(keep=self._resumable and isinstance(error.__cause__, OSError))
            raise
        name = Path(self._current.prefix).name
        self._members.append(SetMember(name, side.num_tokens, side.num_documents, side.dtype, side.fingerprint))

    def _refused(self, rule: str) -> DataError:
        return DataError(Problem(self.prefix, None, rule), title=f"writing {self.prefix}")


def publish_set(finished: Finished) -> None:
    """Rename complete files into place, PREFIX.json last. Interrupted, it can be called again. Raises OSError."""
    prefix = Path(finished.prefix)
    paths = ShardPaths.of(prefix)
    # What is replaced stops being a source before its files change.
    if partial_path(paths.json).exists():
        paths.json.unlink(missing_ok=True)
        if finished.members is not None:  # a single prefix gives way to the set
            paths.idx.unlink(missing_ok=True)
            paths.bin.unlink(missing_ok=True)
    for name in finished.replaced:
        for path in _files(prefix.with_name(name)):
            path.unlink(missing_ok=True)
    for name in finished.members or ():
        publish(prefix.with_name(name))
    if finished.members is None:
        publish(prefix)
    elif partial_path(paths.json).exists() or not paths.json.exists():
        os.replace(partial_path(paths.json), paths.json)
        fsync_directory(paths.json.parent)


def remove_partials(prefix: str, kept: set[str] | None = None) -> None:
    """Remove partial files of ``prefix`` and of shards of its set; with ``kept`` only shards, but for these names."""
    for name in _members_on_disk(prefix, ".partial").difference(kept or ()):
        for path in _files(Path(prefix).with_name(name)):
            partial_path(path).unlink(missing_ok=True)
    if kept is None:
        for path in _files(Path(prefix)):
            partial_path(path).unlink(missing_ok=True)


def _members_on_disk(prefix: str, suffix: str) -> set[str]:
    """Return the names of files that only shards of the set ``prefix`` have."""
    folder, name = Path(prefix).parent, re.escape(Path(prefix).name)
    pattern = re.compile(rf"({name}-\d{{5,}})\.(bin|idx|json){re.escape(suffix)}")
    matches = (pattern.fullmatch(entry.name) for entry in os.scandir(folder)) if folder.is_dir() else ()
    return {match[1] for match in matches if match}


def _files(prefix: Path) -> tuple[Path, Path, Path]:
    paths = ShardPaths.of(prefix)
    return paths.json, paths.idx, paths.bin
