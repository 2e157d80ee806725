"""A source of a recipe: one or thousands of shards, read as one stream of tokens and documents."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.core import phases
from trainer.core.errors import DataError, Problem
from trainer.data.shard_files import FileCache
from trainer.data.shard_manifest import FORMAT, SetManifest, SetMember
from trainer.data.shard_member import Shard, document_starts, open_member, trust_member
from trainer.data.shard_paths import locate
from trainer.data.shard_reader import sampled_blocks
from trainer.data.shard_sidecar import BLOCK_BYTES, SideCar, block_hash, fingerprint_of

Ints = NDArray[np.int64]
# Document starts kept in memory, beside those of the shard in use; 4 bytes a document.
_CACHED_BYTES = 256 * 1024 * 1024
_SAMPLED_BLOCKS = 8
_SAMPLED_TOKENS = 1 << 16


class CorruptBlockError(DataError):
    """Tokens in a block that failed its checksum were asked for."""


@dataclass(frozen=True)
class DocumentCuts:
    """Where documents begin inside spans of tokens."""

    first_document: Ints
    """Document that holds the first token of each span."""
    rows: Ints
    """Flat, in order: the span of every document that begins after the first token of one."""
    columns: Ints
    """Where in its span it begins."""
    documents: Ints
    """Its number in the source."""


class ShardSet:
    """Tokens and documents of a source; numbers count through all of its shards.

    Files are opened when they are read, at most 128 at a time, and read with pread into memory of the caller's: a file
    that shrinks under a running job is an error message, not SIGBUS. Safe to use from several threads.

    Opening looks at the sizes of all files; without a set's manifest also at header, ends of the index and side-car of
    each. Raises DataError with every problem found.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        located = locate(path)
        problems: list[Problem] = []
        shards: list[Shard] = []
        stated: Sequence[SetMember | None] = [None] * len(located.members)
        if located.manifest:
            stated = located.manifest.members
        for member, facts in zip(located.members, stated, strict=True):
            try:
                shards.append(open_member(member) if facts is None else trust_member(member, facts))
            except DataError as error:
                problems += error.problems
        if not problems:
            problems = _disagreements(path, shards)
        if problems:
            raise DataError(problems, title="token shards")
        self.shards: tuple[Shard, ...] = tuple(shards)
        self._manifest = located.manifest
        known = located.manifest or shards[0]
        self.vocab_size: int | None = known.vocab_size
        self.end_of_document_id: int | None = known.end_of_document_id
        self.tokenizer_hash: str | None = known.tokenizer_hash
        several = [FORMAT, [shard.fingerprint for shard in shards]]
        self.fingerprint = shards[0].fingerprint if located.manifest is None and len(shards) == 1 else ""
        self.fingerprint = self.fingerprint or fingerprint_of(several)
        self.notes: tuple[str, ...] = tuple(dict.fromkeys(note for shard in shards for note in shard.notes))
        self._token_ends = np.cumsum([shard.num_tokens for shard in shards], dtype=np.int64)
        self._document_ends = np.cumsum([shard.num_documents for shard in shards], dtype=np.int64)
        self.num_tokens = int(self._token_ends[-1])
        self.num_documents = int(self._document_ends[-1])
        self._files = FileCache()
        self._starts: OrderedDict[int, NDArray[Any]] = OrderedDict()
        self._corrupt: dict[int, tuple[int, set[int]]] = {}
        self._lock = threading.RLock()

    @property
    def num_shards(self) -> int:
        """Number of files of tokens."""
        return len(self.shards)

    @property
    def stated(self) -> SetManifest | SideCar | None:
        """What PREFIX.json says of the whole source; None without one."""
        return self._manifest or (self.shards[0].sidecar() if len(self.shards) == 1 else None)

    def read_many(self, starts: Ints, count: int, out: Ints, limit: int | None) -> None:
        """Copy tokens ``starts[i]`` .. ``starts[i] + count`` of the stream into row i of ``out``, int64 [n, count].

        Raises DataError, with file and place, for an id below 0 or not below ``limit``, for a range outside the stream
        and for a file that has become shorter; CorruptBlockError for rows in blocks given to ``mark_corrupt``.
        """
        if starts.size == 0:
            return
        if int(starts.min()) < 0 or int(starts.max()) + count > self.num_tokens:
            wrong = int(starts.min()) if int(starts.min()) < 0 else int(starts.max())
            rule = f"asks for tokens outside 0..{self.num_tokens}"
            raise _refused(self.path, f"tokens {wrong}..{wrong + count}", rule)
        with self._lock:
            first = np.searchsorted(self._token_ends, starts, side="right")
            last = first if len(self.shards) == 1 else np.searchsorted(self._token_ends, starts + (count - 1), "right")
            dtype = self.shards[int(first[0])].dtype
            touched: set[int] = set(first.tolist())
            plain = bool((first == last).all()) and all(self.shards[i].dtype == dtype for i in touched)
            if plain:
                self._read_rows(first, starts - self._base(first), count, out, limit, dtype)
            else:
                for row, start in enumerate(starts.tolist()):
                    self._read_across(start, count, out[row : row + 1], limit)

    def read(self, start: int, count: int) -> Ints:
        """Return ``count`` tokens of the stream from ``start`` on, a new array."""
        out = np.empty((1, count), dtype=np.int64)
        self.read_many(np.array([start], dtype=np.int64), count, out, None)
        return out[0]

    def document_cuts(self, starts: Ints, count: int) -> DocumentCuts:
        """Return where documents begin in the spans ``starts[i]`` .. ``starts[i] + count``. Empty ones aren't named."""
        with self._lock:
            first = np.searchsorted(self._token_ends, starts, side="right")
            firsts = np.empty_like(starts)
            rows, columns, documents = list[NDArray[Any]](), list[NDArray[Any]](), list[NDArray[Any]]()
            for shard, chosen, begin, offset in self._spans(starts, count, first):
                edges = self._document_starts(shard)
                stop = np.minimum(begin + count - offset, self.shards[shard].num_tokens)
                low = np.searchsorted(edges, begin.astype(edges.dtype), side="right")
                high = np.searchsorted(edges[:-1], stop.astype(edges.dtype), side="left")
                base = int(self._document_ends[shard]) - self.shards[shard].num_documents
                if not offset.any():
                    firsts[chosen] = base + low - 1
                else:  # the row goes on in this shard, whose beginning is a document's
                    low = low - 1
                counts = np.maximum(high - low, 0)
                inside = np.repeat(low - np.cumsum(counts) + counts, counts) + np.arange(int(counts.sum()))
                row = np.repeat(chosen, counts)
                rows.append(row)
                shift = np.repeat(offset - begin, counts)
                columns.append(edges[inside].astype(np.int64) + shift)
                documents.append(base + inside)
        return _in_order(firsts, rows, columns, documents)

    def document_spans(self, documents: Ints) -> tuple[Ints, Ints]:
        """Return (first token in the stream, number of tokens) of each document."""
        if documents.size and not (int(documents.min()) >= 0 and int(documents.max()) < self.num_documents):
            raise _refused(self.path, None, f"asks for documents outside 0..{self.num_documents}")
        starts, lengths = np.empty_like(documents), np.empty_like(documents)
        with self._lock:
            shards = np.searchsorted(self._document_ends, documents, side="right")
            for shard in _distinct(shards):
                chosen = shards == shard
                edges = self._document_starts(shard)
                local = documents[chosen] - (int(self._document_ends[shard]) - self.shards[shard].num_documents)
                begin = edges[local].astype(np.int64)
                starts[chosen] = begin + (int(self._token_ends[shard]) - self.shards[shard].num_tokens)
                lengths[chosen] = edges[local + 1].astype(np.int64) - begin
        return starts, lengths

    def document_lengths(self, first: int, count: int) -> Ints:
        """Return the number of tokens of ``count`` documents from ``first`` on."""
        return self.document_spans(np.arange(first, first + count, dtype=np.int64))[1]

    def origin(self, token: int) -> tuple[str, int, int]:
        """Return (shard, document in that shard, token in that document) of a token of the stream."""
        with self._lock:
            shard = int(np.searchsorted(self._token_ends, token, side="right"))
            local = token - (int(self._token_ends[shard]) - self.shards[shard].num_tokens)
            edges = self._document_starts(shard)
            document = int(np.searchsorted(edges[:-1], local, side="right")) - 1
            return self.shards[shard].path, document, local - int(edges[document])

    def check_blocks(self, rank: int, world_size: int, full: bool) -> list[tuple[int, int, str]]:
        """Compare this rank's share of blocks with their checksums; return (shard, block, message) of those that fail.

        ``full``: all blocks; else 8 of the source, evenly spaced. Shards without a side-car have no checksums.
        """
        failed: list[tuple[int, int, str]] = []
        for number, (shard, block) in enumerate(self._blocks(full)):
            if number % world_size != rank:
                continue
            if (message := self._check_block(shard, block)) is not None:
                failed.append((shard, block, message))
            phases.board.advance()  # all blocks of a large source take long
        return failed

    def sample_ids(self, limit: int) -> None:
        """Look at ids of 8 places of shards without a side-car. Raises DataError for one not below ``limit``."""
        for i in range(_SAMPLED_BLOCKS):
            count = min(_SAMPLED_TOKENS, self.num_tokens)
            start = i * (self.num_tokens - count) // (_SAMPLED_BLOCKS - 1)
            shard = int(np.searchsorted(self._token_ends, start, side="right"))
            if self.shards[shard].tokenizer_hash is None and self.vocab_size is None:
                out = np.empty((1, count), dtype=np.int64)
                self.read_many(np.array([start], dtype=np.int64), count, out, limit)

    def check_index(self, rank: int, world_size: int) -> list[tuple[int, str]]:
        """Read the document index of this rank's share of at most 8 shards; return (shard, message) of bad ones."""
        failed: list[tuple[int, str]] = []
        for number, shard in enumerate(sampled_blocks(len(self.shards), _SAMPLED_BLOCKS)):
            if number % world_size == rank:
                failed += [(shard, str(problem)) for problem in self.shards[shard].problems()]
        return failed

    def mark_corrupt(self, blocks: Sequence[tuple[int, int]]) -> None:
        """Refuse from now on to read rows that touch these (shard, block)."""
        for shard, block in blocks:
            sidecar = self.shards[shard].sidecar()
            block_bytes = sidecar.block_bytes if sidecar else BLOCK_BYTES
            self._corrupt.setdefault(shard, (block_bytes, set()))[1].add(block)

    def close(self) -> None:
        """Close the files; arrays that were read stay valid."""
        with self._lock:
            self._files.close()

    def _base(self, shards: Ints) -> Ints:
        """Return the number of the first token of each of ``shards``."""
        return np.concatenate([np.zeros(1, dtype=np.int64), self._token_ends])[shards]

    def _read_rows(
        self, shards: Ints, starts: Ints, count: int, out: Ints, limit: int | None, dtype: np.dtype[Any]
    ) -> None:
        """Read rows that each lie in one shard; all shards have one dtype."""
        item = dtype.itemsize
        raw = np.empty((starts.size, count), dtype=dtype)
        view, row_bytes = raw.reshape(-1).view(np.uint8).data, count * item
        read_into, paths = self._files.read_into, [shard.tokens_path for shard in self.shards]
        position = 0
        offsets: list[int] = (starts * item).tolist()
        numbers: list[int] = shards.tolist()
        for shard, offset in zip(numbers, offsets, strict=True):
            if self._corrupt:
                self._refuse_corrupt(shard, offset, row_bytes)
            read_into(paths[shard], view[position : position + row_bytes], offset)
            position += row_bytes
        too_large = limit is not None and limit <= np.iinfo(dtype).max and int(raw.max()) >= limit
        if too_large or (dtype.kind == "i" and int(raw.min()) < 0):
            self._refuse_id(raw, shards, starts, limit)
        out[:] = raw

    def _read_across(self, start: int, count: int, out: Ints, limit: int | None) -> None:
        column = 0
        while column < count:
            shard = int(np.searchsorted(self._token_ends, start + column, side="right"))
            base = int(self._token_ends[shard]) - self.shards[shard].num_tokens
            part = min(count - column, int(self._token_ends[shard]) - start - column)
            where = np.array([shard]), np.array([start + column - base])
            self._read_rows(*where, part, out[:, column : column + part], limit, self.shards[shard].dtype)
            column += part

    def _spans(self, starts: Ints, count: int, first: Ints) -> Iterator[tuple[int, Ints, Ints, Ints]]:
        """Yield (shard, rows, first token in the shard, column it stands at) of the parts of spans in each shard."""
        shards, rows, columns = first, np.arange(starts.size), np.zeros_like(starts)
        while rows.size:
            begin = starts[rows] + columns - self._base(shards)
            for shard in _distinct(shards):
                chosen = shards == shard
                yield shard, rows[chosen], begin[chosen], columns[chosen]
            reached = self._token_ends[shards] - starts[rows]  # column at which the next shard begins
            on = reached < count
            shards, rows, columns = shards[on] + 1, rows[on], reached[on]

    def _document_starts(self, shard: int) -> NDArray[Any]:
        found = self._starts.get(shard)
        if found is None:
            found = document_starts(self.shards[shard], self._files)
            self._starts[shard] = found
            while len(self._starts) > 1 and sum(array.nbytes for array in self._starts.values()) > _CACHED_BYTES:
                self._starts.popitem(last=False)
        else:
            self._starts.move_to_end(shard)
        return found

    def _blocks(self, full: bool) -> Iterator[tuple[int, int]]:
        if full:
            for i, shard in enumerate(self.shards):
                if (sidecar := shard.sidecar()) is not None:
                    yield from ((i, block) for block in range(len(sidecar.bin_blocks)))
            return
        chosen: dict[tuple[int, int], None] = {}
        for i in range(_SAMPLED_BLOCKS):
            token = i * (self.num_tokens - 1) // (_SAMPLED_BLOCKS - 1)
            shard = int(np.searchsorted(self._token_ends, token, side="right"))
            local = token - (int(self._token_ends[shard]) - self.shards[shard].num_tokens)
            if (sidecar := self.shards[shard].sidecar()) is not None:
                chosen[shard, local * self.shards[shard].dtype.itemsize // sidecar.block_bytes] = None
        yield from chosen

    def _check_block(self, shard: int, block: int) -> str | None:
        facts = self.shards[shard]
        sidecar = facts.sidecar()
        if sidecar is None:
            return None
        start = block * sidecar.block_bytes
        data = bytearray(min(sidecar.block_bytes, facts.num_tokens * facts.dtype.itemsize - start))
        where = f"{facts.tokens_path} bytes {start}..{start + len(data)} (block {block})"
        try:
            with self._lock:
                self._files.read_into(facts.tokens_path, memoryview(data), start)
        except DataError as error:
            return f"{where}: {error.problems[0].rule}"
        found, expected = block_hash(memoryview(data)), sidecar.bin_blocks[block]
        return None if found == expected else f"{where} has checksum {found}, expected {expected}"

    def _refuse_corrupt(self, shard: int, offset: int, num_bytes: int) -> None:
        block_bytes, blocks = self._corrupt.get(shard, (1, set[int]()))
        touched = range(offset // block_bytes, (offset + num_bytes - 1) // block_bytes + 1)
        if blocks and (bad := next((block for block in touched if block in blocks), None)) is not None:
            path = self.shards[shard].tokens_path
            raise CorruptBlockError(Problem(path, f"block {bad}", "failed its checksum"), title="token shards")

    def _refuse_id(self, raw: NDArray[Any], shards: Ints, starts: Ints, limit: int | None) -> None:
        bad = raw < 0 if limit is None else (raw < 0) | (raw >= limit)
        row, column = (int(axis[0]) for axis in np.nonzero(bad))
        shard, token = self.shards[int(shards[row])], int(starts[row]) + column
        raise _refused(
            f"{shard.tokens_path} at token {token} (byte {token * shard.dtype.itemsize})",
            int(raw[row, column]),
            f"token id outside 0..{'' if limit is None else limit - 1}, the model's vocabulary",
            "were these shards made with another tokenizer? `trainer data verify PREFIX --full` looks for damage",
        )


def _in_order(
    firsts: Ints, rows: list[NDArray[Any]], columns: list[NDArray[Any]], documents: list[NDArray[Any]]
) -> DocumentCuts:
    row, column, document = (np.concatenate(parts).astype(np.int64) for parts in (rows, columns, documents))
    if len(rows) > 1:
        order = np.lexsort((document, column, row))
        row, column, document = row[order], column[order], document[order]
    # Of several documents that begin at the same token all but the last are empty.
    kept = np.append((np.diff(row) != 0) | (np.diff(column) != 0), np.ones(min(1, row.size), dtype=np.bool_))
    kept &= column > 0
    return DocumentCuts(firsts, row[kept], column[kept], document[kept])


def _distinct(numbers: Ints) -> list[int]:
    return np.unique(numbers).tolist()


def _disagreements(path: str, shards: Sequence[Shard]) -> list[Problem]:
    problems: list[Problem] = []
    hashes = {shard.tokenizer_hash: shard.path for shard in shards if shard.tokenizer_hash}
    if len(hashes) > 1:
        rule = f"holds shards of different tokenizers, e.g. {' and '.join(list(hashes.values())[:2])}"
        problems.append(Problem(path, None, rule, "tokenize them with one tokenizer"))
    return problems


def _refused(path: str, value: object, rule: str, fix: str = "") -> DataError:
    return DataError(Problem(path, value, rule, fix), title="token shards")
