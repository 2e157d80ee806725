"""From rows of tokens and the documents in them to what a model is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from trainer.core.targets import IGNORE_INDEX
from trainer.data.packing import Ints, Segments

DIGEST_BITS = 48
"""A digest is a sum modulo 2^48: exact in a float64, and sums of 32,768 ranks still fit an int64."""


@dataclass(frozen=True)
class MicroBatch:
    """What one rank runs through the model at a time."""

    input_ids: torch.Tensor
    """int64 [micro, S]."""
    targets: torch.Tensor
    """int64 [micro, S]: the token after each input (already shifted), or IGNORE_INDEX."""
    position_ids: torch.Tensor | None = None
    """int64 [micro, S]: place in the document; only where attention stays inside documents."""
    document_ids: torch.Tensor | None = None
    """int64 [micro, S]: 0 for the first document of a row, 1 for the next; padding counts as one."""
    sources: torch.Tensor | None = None
    """int64 [micro]: which source of ``data.train`` each row is from."""
    digest: int = 0
    """Sum of the rows' digests (see ``digest_rows``)."""
    num_corrupt: int = 0
    """Rows left out because their data is corrupt: every target is IGNORE_INDEX."""

    @property
    def cumulative_lengths(self) -> torch.Tensor:
        """Return where documents begin in the flattened rows, and the total: int32, as varlen attention wants it."""
        assert self.position_ids is not None
        starts = torch.nonzero(self.position_ids.flatten() == 0).flatten()
        return torch.cat([starts, starts.new_tensor([self.position_ids.numel()])]).to(torch.int32)


@dataclass(frozen=True)
class Rows:
    """Samples in the order of a rank's step, before they are cut into micro-batches; all [rows, S] or [rows]."""

    inputs: Ints
    targets: Ints
    positions: Ints | None
    documents: Ints | None
    sources: Ints
    digests: list[int]
    corrupt: NDArray[np.bool_]

    def micro_batches(self, micro_size: int) -> list[MicroBatch]:
        """Cut the rows into micro-batches, views of the same memory."""
        return [self._micro_batch(slice(i, i + micro_size)) for i in range(0, len(self.inputs), micro_size)]

    def _micro_batch(self, rows: slice) -> MicroBatch:
        def tensor(values: NDArray[Any] | None) -> torch.Tensor | None:
            return None if values is None else torch.from_numpy(values[rows])

        return MicroBatch(
            torch.from_numpy(self.inputs[rows]),
            torch.from_numpy(self.targets[rows]),
            tensor(self.positions),
            tensor(self.documents),
            tensor(self.sources),
            sum(self.digests[rows]) % (1 << DIGEST_BITS),
            int(self.corrupt[rows].sum()),
        )


def digest_rows(tokens: Ints, sample_numbers: Ints) -> list[int]:
    """Return a digest of each row of S + 1 tokens, bound to its sample number.

    Their sum over a global batch says which tokens a step saw and under which number, however ranks and micro-batches
    shared them.
    """
    mask = (1 << DIGEST_BITS) - 1
    digest = xxhash.xxh3_64_intdigest
    return [digest(row.data, number) & mask for row, number in zip(tokens, sample_numbers.tolist(), strict=True)]


def mask_targets(targets: Ints, segments: Segments, trains_boundaries: bool) -> None:
    """Set to IGNORE_INDEX what is padding and, unless ``trains_boundaries``, what begins another document.

    ``targets`` is [rows, S]; target column c is token column c + 1.
    """
    num_rows, length = targets.shape
    if not trains_boundaries:
        inner = segments.columns > 0
        targets[segments.rows[inner], segments.columns[inner] - 1] = IGNORE_INDEX
    ends = np.zeros(num_rows, dtype=np.int64)
    np.maximum.at(ends, segments.rows, segments.columns + segments.lengths)
    for row in np.flatnonzero(ends <= length).tolist():
        targets[row, max(0, int(ends[row]) - 1) :] = IGNORE_INDEX


def number_documents(num_rows: int, length: int, segments: Segments) -> tuple[Ints, Ints]:
    """Return (place in its document, number of its document in the row) of every input, int64 [rows, S] each.

    Padding is a document of its own. The place counts from the start of the row for a document that began before it.
    """
    flat = segments.rows * length + segments.columns
    kept = segments.columns < length  # a document may begin at the last target, which is no input
    ends = flat + segments.lengths
    row_ends = (segments.rows + 1) * length
    last = np.append(segments.rows[1:] != segments.rows[:-1], True)
    padding = ends[last & (ends < row_ends)]
    empty = np.flatnonzero(np.bincount(segments.rows, minlength=num_rows) == 0) * length
    starts = flat[kept]
    if padding.size or empty.size:
        starts = np.sort(np.concatenate([starts, padding, empty]))
    total = num_rows * length
    lengths = np.diff(np.append(starts, total))
    # Both fall out of one running sum each: steps of one, put back at every start.
    positions = np.ones(total, dtype=np.int64)
    positions[0] = 0
    positions[starts[1:]] = 1 - lengths[:-1]
    documents = np.zeros(total, dtype=np.int64)
    documents[starts[1:]] = 1
    first_of_row = starts % length == 0
    counts = np.diff(np.append(np.flatnonzero(first_of_row), starts.size))
    documents[starts[first_of_row][1:]] = 1 - counts[:-1]
    np.cumsum(positions, out=positions)
    np.cumsum(documents, out=documents)
    return positions.reshape(num_rows, length), documents.reshape(num_rows, length)
