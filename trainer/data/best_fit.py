"""``best_fit``: whole documents packed into samples; only documents longer than a sample are cut.

Best-fit decreasing within windows of 256 consecutive documents (Ding et al., "Fewer Truncations Improve Language
Modeling", 2024, pack all documents at once). A document longer than S + 1 tokens gives full samples first, each going
on with the last token of the one before, so that every token but the first is a target once; what is left over is
packed like a short document. Windows make the packing of any sample computable from 256 lengths: in memory is one
integer a window, 8 bytes for 256 documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.packing import Documents, Ints, Segments, copy_segments

WINDOW = 256
"""Documents packed together."""
_PLANNED_AT_ONCE = 2048
"""Windows whose samples are counted together; bounds memory (a few MB) and keeps NumPy busy."""
_MIN_PIECE = 2
"""A piece of one token has no target: it isn't packed."""


@dataclass(frozen=True)
class _Windows:
    """Documents of some windows, split into full samples and left-over pieces. All are [windows, 256]."""

    starts: Ints
    full: Ints
    """Full samples each document gives."""
    rest: Ints
    """Tokens left over, 0 if none."""
    bins: NDArray[np.int32]
    """Which bin of its window the left-over piece is in."""
    num_bins: Ints
    """Bins of each window, [windows]."""


class BestFit:
    """Samples of one source under ``best_fit``."""

    name = "best_fit"
    pads = True

    def __init__(self, source: Documents, sequence_length: int) -> None:
        self._source, self._length = source, sequence_length
        counts = [np.zeros(1, dtype=np.int64)]
        per_round = WINDOW * _PLANNED_AT_ONCE
        for first in range(0, source.num_documents, per_round):
            lengths = source.document_lengths(first, min(per_round, source.num_documents - first))
            padded = np.zeros(-(-lengths.size // WINDOW) * WINDOW, dtype=np.int64)
            padded[: lengths.size] = lengths
            full, rest = self._split(padded.reshape(-1, WINDOW))
            counts.append(full.sum(axis=1) + pack(rest, sequence_length + 1)[1])
        self._firsts = np.cumsum(np.concatenate(counts))  # first sample of each window, and the total
        self.num_samples = int(self._firsts[-1])

    def segments(self, samples: Ints) -> Segments:
        """See Packing."""
        windows, row_window = np.unique(np.searchsorted(self._firsts, samples, side="right") - 1, return_inverse=True)
        plan = self._plan(windows)
        local = samples - self._firsts[windows[row_window]]
        num_full = plan.full.sum(axis=1)
        pieces: list[tuple[Ints, Ints, Ints, Ints, Ints]] = []
        in_full = local < num_full[row_window]
        if in_full.any():
            pieces.append(self._full_pieces(plan, windows, row_window, local, in_full))
        if not in_full.all():
            pieces.append(self._bin_pieces(plan, windows, row_window, local - num_full[row_window], ~in_full))
        rows, columns, lengths, documents, starts = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        order = np.lexsort((columns, rows))
        return Segments(rows[order], columns[order], lengths[order], documents[order], starts[order])

    def fill(self, samples: Ints, out: Ints, limit: int | None, wanted: bool) -> Segments:
        """See Packing."""
        segments = self.segments(samples)
        copy_segments(self._source, segments, out, limit)
        return segments

    def _split(self, lengths: Ints) -> tuple[Ints, Ints]:
        """Return (full samples, tokens left over) of documents of the given lengths."""
        width = self._length + 1
        full = np.where(lengths > width, (lengths - 1) // self._length, 0)
        rest = lengths - full * self._length
        return full, np.where(rest < _MIN_PIECE, 0, rest)

    def _plan(self, windows: Ints) -> _Windows:
        documents = windows[:, None] * WINDOW + np.arange(WINDOW)
        exist = documents < self._source.num_documents
        starts, lengths = np.zeros_like(documents), np.zeros_like(documents)
        starts[exist], lengths[exist] = self._source.document_spans(documents[exist])
        full, rest = self._split(lengths)
        bins, num_bins = pack(rest, self._length + 1)
        return _Windows(starts, full, rest, bins, num_bins)

    def _full_pieces(
        self, plan: _Windows, windows: Ints, row_window: Ints, local: Ints, chosen: NDArray[np.bool_]
    ) -> tuple[Ints, Ints, Ints, Ints, Ints]:
        rows = np.flatnonzero(chosen)
        window, index = row_window[rows], local[rows]
        ends = np.cumsum(plan.full, axis=1)[window]
        place = (ends <= index[:, None]).sum(axis=1)  # which document of the window the index-th full sample is from
        piece = index - ends[np.arange(rows.size), place] + plan.full[window, place]
        starts = plan.starts[window, place] + piece * self._length
        lengths = np.full(rows.size, self._length + 1, dtype=np.int64)
        return rows, np.zeros_like(rows), lengths, windows[window] * WINDOW + place, starts

    def _bin_pieces(
        self, plan: _Windows, windows: Ints, row_window: Ints, bin_number: Ints, chosen: NDArray[np.bool_]
    ) -> tuple[Ints, Ints, Ints, Ints, Ints]:
        rows = np.flatnonzero(chosen)
        window = row_window[rows]
        inside = (plan.bins[window] == bin_number[rows][:, None]) & (plan.rest[window] > 0)  # [rows, 256]
        row, place = np.nonzero(inside)
        lengths = plan.rest[window[row], place]
        # Pieces of a row lie one after the other, in the order of their documents.
        before = np.cumsum(lengths) - lengths
        first = np.searchsorted(row, np.arange(rows.size))
        columns = before - before[first][row]
        skipped = plan.full[window[row], place] * self._length
        return (
            rows[row],
            columns,
            lengths,
            windows[window[row]] * WINDOW + place,
            plan.starts[window[row], place] + skipped,
        )


def pack(lengths: Ints, capacity: int) -> tuple[NDArray[np.int32], Ints]:
    """Pack pieces into bins, window by window, longest first, each into the fullest bin that has room.

    ``lengths`` is [windows, pieces]; 0 is no piece. Returns (bin of each piece, int32 [windows, pieces]; bins of each
    window, int64 [windows]). Ties go to the earlier piece and the lower bin.
    """
    num_windows, num_pieces = lengths.shape
    order = np.argsort(-lengths, axis=1, kind="stable")
    ordered = np.take_along_axis(lengths, order, axis=1).astype(np.int32)
    bins = np.zeros((num_windows, num_pieces), dtype=np.int32)
    room = np.full((num_windows, num_pieces), capacity, dtype=np.int32)
    used = np.zeros(num_windows, dtype=np.int64)
    every = np.arange(num_windows, dtype=np.int64)
    for i in range(num_pieces):
        length = ordered[:, i]
        if not length.any():
            break
        open_bins = room[:, : int(used.max()) + 1]  # the next empty bin takes what fits nowhere else
        best = np.where(open_bins >= length[:, None], open_bins, capacity + 1).argmin(axis=1)
        room[every, best] -= length
        used = np.maximum(used, np.where(length > 0, best + 1, 0))
        bins[every, order[:, i]] = best
    return bins, used
