"""How the documents of a source are cut into samples of S inputs and S targets (S + 1 tokens, one shared or padded).

- ``documents``: documents lie end to end, and a sample is every S tokens of that stream plus the one that follows.
  What is left at the end, fewer than S targets, is unused.
- ``one_per_sequence``: a sample is the beginning of one document, padded.
- ``best_fit``: see ``best_fit``.

A sample number of a source means the same tokens in every epoch; only the order of sample numbers changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Documents(Protocol):
    """What packing asks of token shards; numbers of tokens and documents count through the whole source."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_documents(self) -> int: ...
    def read_many(self, starts: Ints, count: int, out: Ints, limit: int | None) -> None: ...
    def read(self, start: int, count: int) -> Ints: ...
    def document_cuts(self, starts: Ints, count: int) -> Cuts: ...
    def document_spans(self, documents: Ints) -> tuple[Ints, Ints]: ...
    def document_lengths(self, first: int, count: int) -> Ints: ...


class Cuts(Protocol):
    """Where documents begin inside spans of tokens; rows, columns and documents are flat and in order."""

    @property
    def first_document(self) -> Ints: ...
    @property
    def rows(self) -> Ints: ...
    @property
    def columns(self) -> Ints: ...
    @property
    def documents(self) -> Ints: ...


@dataclass(frozen=True)
class Segments:
    """Pieces of documents in rows of S + 1 tokens, flat, by row and column. What no piece covers is padding."""

    rows: Ints
    columns: Ints
    """Where in its row each piece begins."""
    lengths: Ints
    """Tokens of each piece."""
    documents: Ints
    """Number of its document in the source."""
    starts: Ints
    """Its first token in the source."""


class Packing(Protocol):
    """Samples of one source."""

    name: str
    num_samples: int
    """Samples in one pass over the source."""
    pads: bool
    """Whether rows may end in padding."""

    def segments(self, samples: Ints) -> Segments:
        """Return the pieces that make up some samples; row i is ``samples[i]``."""
        ...

    def fill(self, samples: Ints, out: Ints, limit: int | None, wanted: bool) -> Segments | None:
        """Copy the tokens of ``samples`` into ``out``, int64 [n, S + 1]; return their pieces if ``wanted``.

        Padding is 0. Packings that pad return the pieces always. Raises DataError for an id that isn't below
        ``limit``, and for damaged shards.
        """
        ...


class DocumentStream:
    """``documents``."""

    name = "documents"
    pads = False

    def __init__(self, source: Documents, sequence_length: int) -> None:
        self._source, self._length = source, sequence_length
        self.num_samples = samples_in(source.num_tokens, sequence_length)

    def segments(self, samples: Ints) -> Segments:
        """See Packing."""
        starts = samples * self._length
        width = self._length + 1
        cuts = self._source.document_cuts(starts, width)
        # Every row begins with a piece; the cuts follow it.
        rows = np.concatenate([np.arange(samples.size), cuts.rows])
        order = np.argsort(rows, kind="stable")
        rows = rows[order]
        columns = np.concatenate([np.zeros_like(samples), cuts.columns])[order]
        documents = np.concatenate([cuts.first_document, cuts.documents])[order]
        ends = np.append(columns[1:], width)
        ends[np.append(rows[1:] != rows[:-1], True)] = width
        return Segments(rows, columns, ends - columns, documents, starts[rows] + columns)

    def fill(self, samples: Ints, out: Ints, limit: int | None, wanted: bool) -> Segments | None:
        """See Packing."""
        self._source.read_many(samples * self._length, self._length + 1, out, limit)
        return self.segments(samples) if wanted else None


class OnePerSequence:
    """``one_per_sequence``."""

    name = "one_per_sequence"
    pads = True

    def __init__(self, source: Documents, sequence_length: int) -> None:
        self._source, self._length = source, sequence_length
        self.num_samples = source.num_documents

    def segments(self, samples: Ints) -> Segments:
        """See Packing."""
        starts, lengths = self._source.document_spans(samples)
        rows, lengths = np.arange(samples.size), np.minimum(lengths, self._length + 1)
        kept = lengths > 0  # shards made elsewhere may hold empty documents
        return Segments(rows[kept], np.zeros_like(rows)[kept], lengths[kept], samples[kept], starts[kept])

    def fill(self, samples: Ints, out: Ints, limit: int | None, wanted: bool) -> Segments:
        """See Packing."""
        segments = self.segments(samples)
        copy_segments(self._source, segments, out, limit)
        return segments


def copy_segments(source: Documents, segments: Segments, out: Ints, limit: int | None) -> None:
    """Copy every piece to its place in ``out`` [n, S + 1] and fill the rest with 0."""
    out[:] = 0
    pieces = zip(
        segments.rows.tolist(),
        segments.columns.tolist(),
        segments.lengths.tolist(),
        segments.starts.tolist(),
        strict=True,
    )
    for row, column, length, start in pieces:
        source.read_many(np.array([start]), length, out[row : row + 1, column : column + length], limit)


def samples_in(num_tokens: int, sequence_length: int) -> int:
    """Return how many samples of ``sequence_length`` targets fit into a stream of ``num_tokens``; may be 0."""
    return max(0, (num_tokens - 1) // sequence_length)
