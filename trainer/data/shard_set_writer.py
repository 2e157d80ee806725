"""Write a source as one prefix, or as a set of shards of a bounded size."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from trainer.core.errors import DataError, Problem
from trainer.data.shard_index import IndexHeader, ShardPaths, dtype_code
from trainer.data.shard_manifest import SetManifest, SetMember, member_name, write_set_manifest
from trainer.data.shard_paths import read_manifest
from trainer.data.shard_writer import ShardWriter, tool_version


@dataclass(frozen=True)
class Written:
    """What was committed."""

    num_documents: int
    num_tokens: int
    fingerprint: str


class SetWriter:
    """Write documents to PREFIX, or with ``shard_bytes`` to PREFIX-00000, PREFIX-00001, … and PREFIX.json.

    A shard's .bin stays within ``shard_bytes`` unless a single document is larger; documents are never split.
    PREFIX.json comes last: without it the members are no source. Without ``shard_bytes`` the files are those of
    ShardWriter, byte for byte. The other options are ShardWriter's.
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
    ) -> None:
        self.prefix = os.fspath(prefix)
        self._shard_bytes = shard_bytes
        self._vocab_size, self._overwrite = vocab_size, overwrite
        self._end_of_document_id = end_of_document_id
        self._tokenizer = (tokenizer_name, tokenizer_hash)
        self._item = IndexHeader(dtype_code(vocab_size), 0, 0).dtype.itemsize
        self._members: list[SetMember] = []
        self._done = [0, 0]  # documents and tokens of committed members
        self._committed = False
        self._old = self._existing()
        self._current = self._open()

    @property
    def num_documents(self) -> int:
        """Documents so far."""
        return self._done[0] + self._current.num_documents

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return self._done[1] + self._current.num_tokens

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
            room = self._shard_bytes // self._item - self._current.num_tokens
            fitting = int(np.searchsorted(ends, token + room, side="right")) - first
            if fitting <= 0 and self._current.num_documents:
                self._finish_member()
                continue
            stop = first + max(1, fitting)
            upto = int(ends[stop - 1])
            self._current.add_many(tokens[token:upto], lengths[first:stop])
            first, token = stop, upto

    def commit(self, report: dict[str, Any] | None = None) -> Written:
        """Finish the files, PREFIX.json last. Raises DataError if no document was added or the disk fails."""
        if self._shard_bytes is None:
            side = self._current.commit(report)
            self._committed = True
            self._remove_old(set())
            return Written(side.num_documents, side.num_tokens, side.fingerprint)
        self._finish_member(last=True)
        facts = (self._vocab_size, self._end_of_document_id, *self._tokenizer, tool_version(), report or {})
        manifest = SetManifest(tuple(self._members), *facts)
        paths = ShardPaths.of(self.prefix)
        for path in (paths.bin, paths.idx):
            path.unlink(missing_ok=True)  # of a single prefix that this set replaces
        write_set_manifest(self.prefix, manifest)
        self._committed = True
        self._remove_old({member.name for member in self._members})
        return Written(self._done[0], self._done[1], manifest.fingerprint)

    def abort(self) -> None:
        """Remove what was written. Harmless after ``commit``."""
        self._current.abort()
        if not self._committed:
            self._remove(member.name for member in self._members)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.abort()

    def _existing(self) -> set[str]:
        """Return the members of a set that is about to be replaced. Raises DataError without ``overwrite``."""
        manifest = read_manifest(Path(self.prefix + ".json"))
        if manifest is not None and not self._overwrite:
            fix = "choose another output prefix, or pass --overwrite"
            raise DataError(Problem(self.prefix + ".json", None, "exists already", fix), title=f"writing {self.prefix}")
        return {member.name for member in manifest.members} if manifest else set()

    def _open(self) -> ShardWriter:
        prefix = Path(self.prefix)
        if self._shard_bytes is not None:
            prefix = prefix.with_name(member_name(self.prefix, len(self._members)))
        return ShardWriter(
            prefix,
            self._vocab_size,
            end_of_document_id=self._end_of_document_id,
            tokenizer_name=self._tokenizer[0],
            tokenizer_hash=self._tokenizer[1],
            overwrite=self._overwrite,
        )

    def _finish_member(self, last: bool = False) -> None:
        side = self._current.commit()
        name = Path(self._current.prefix).name
        self._members.append(SetMember(name, side.num_tokens, side.num_documents, side.dtype, side.fingerprint))
        self._done[0] += side.num_documents
        self._done[1] += side.num_tokens
        if not last:
            self._current = self._open()

    def _remove_old(self, kept: set[str]) -> None:
        self._remove(sorted(self._old - kept))

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            for path in vars(ShardPaths.of(Path(self.prefix).with_name(name))).values():
                path.unlink(missing_ok=True)
