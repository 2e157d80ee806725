"""Which documents a step read: computed from the recipe alone, nothing was stored while training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.config.data import DataConfig
from trainer.data.batches import DIGEST_BITS, digest_rows
from trainer.data.sampler import Sampler
from trainer.data.sources import Source, open_train_sources


@dataclass(frozen=True)
class Piece:
    """A stretch of one document inside a sample."""

    shard: str
    """Prefix of its shard."""
    document: int
    """Number of the document in that shard."""
    first_token: int
    """Where in the document the piece begins."""
    num_tokens: int
    stream_token: int
    """Its first token in the whole source."""


@dataclass(frozen=True)
class SampleEntry:
    """One sample of a global batch."""

    sample: int
    """Global sample number."""
    source: str
    epoch: int
    """Passes over the source that were finished before."""
    sample_of_source: int
    pieces: tuple[Piece, ...]


class Ledger:
    """Look up samples by their global number. Raises DataError like the loader. Safe to use beside it."""

    def __init__(self, sources: Sequence[Source], sampler: Sampler, sequence_length: int) -> None:
        """``sources`` are opened ones, in the order of ``data.train``."""
        self.sources, self._sampler, self._length = sources, sampler, sequence_length

    @classmethod
    def open(cls, data: DataConfig, seed: int) -> Ledger:
        """Open the sources of a recipe; under ``best_fit`` that packs all of their documents."""
        sources = open_train_sources(data, None)
        fingerprints = [source.shards.fingerprint for source in sources]
        counts = [source.packing.num_samples for source in sources]
        return cls(sources, Sampler(data, seed, fingerprints, counts), data.sequence_length)

    def entries(self, first_sample: int, count: int) -> Iterator[SampleEntry]:
        """Yield the samples ``first_sample`` .. ``first_sample + count``."""
        for number in range(first_sample, first_sample + count):
            source, sample, epoch = self._sampler.locate(number)
            opened = self.sources[source]
            segments = opened.packing.segments(np.array([sample], dtype=np.int64))
            pieces = tuple(
                Piece(*opened.shards.origin(start), length, start)
                for start, length in zip(segments.starts.tolist(), segments.lengths.tolist(), strict=True)
            )
            yield SampleEntry(number, opened.label, epoch, sample, pieces)

    def tokens(self, entry: SampleEntry, piece: Piece) -> list[int]:
        """Return the token ids of a piece."""
        source = next(source for source in self.sources if source.label == entry.source)
        return source.shards.read(piece.stream_token, piece.num_tokens).tolist()

    def batch_hash(self, first_sample: int, count: int) -> str:
        """Return what metrics.jsonl holds as ``batch_hash`` of a step that read these samples."""
        total = 0
        numbers = np.arange(first_sample, first_sample + count)
        sources, samples, _ = self._sampler.locate_many(numbers)
        row = np.empty((1, self._length + 1), dtype=np.int64)
        for source, sample, number in zip(sources.tolist(), samples.tolist(), numbers.tolist(), strict=True):
            self.sources[source].packing.fill(np.array([sample]), row, None, False)
            total += digest_rows(row, np.array([number]))[0]
        return hash_text(total % (1 << DIGEST_BITS))


def hash_text(digest: int) -> str:
    """Return a batch digest as 12 hex digits."""
    return f"{digest:012x}"
