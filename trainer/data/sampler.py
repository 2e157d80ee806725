"""Global sample number → (source, sample): mixture, then epoch, then order within the epoch. Torch-free.

The whole state is how many samples were consumed: one integer. Ranks and workers only slice the sequence of numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.core.errors import DataError, Problem
from trainer.data.mixing import MIXING_VERSION, Mixture
from trainer.data.order import ORDER_VERSION, epoch_key, permute, permute_many
from trainer.data.packing import samples_in
from trainer.data.shard_sidecar import fingerprint_of


class Source(Protocol):
    """What the sampler needs to know of token shards."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def num_tokens(self) -> int: ...


class Sampler:
    """Order of all samples of a run: a pure function of the seed, the sources, their weights and the length.

    Raises DataError for a source that is too short for one sample and for weights that can't be used.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], seed: int, sequence_length: int) -> None:
        if len(sources) != len(weights):
            raise ValueError(f"{len(sources)} sources but {len(weights)} weights")
        self._mixture = Mixture(weights)
        self._seed = seed
        self._sequence_length = sequence_length
        self._fingerprints = tuple(source.fingerprint for source in sources)
        self.samples_per_epoch = tuple(samples_in(source.num_tokens, sequence_length) for source in sources)
        """Samples in one pass over each source."""
        problems = [
            Problem(
                f"data.train.{i}",
                f"{sources[i].num_tokens} tokens",
                f"is too short for one sample of data.sequence_length + 1 = {sequence_length + 1} tokens",
                "lower data.sequence_length, or use more text",
            )
            for i, count in enumerate(self.samples_per_epoch)
            if count < 1
        ]
        if problems:
            raise DataError(problems, title="data")

    @property
    def proportions(self) -> tuple[float, ...]:
        """The share of samples each source really gets."""
        return self._mixture.proportions

    @property
    def fingerprint(self) -> str:
        """Hash of what decides which tokens a sample number names, but for the seed: 32 hex digits."""
        versions = [ORDER_VERSION, MIXING_VERSION, "documents"]
        return fingerprint_of([versions, self._sequence_length, self._fingerprints, self._mixture.counts])

    def locate(self, sample_number: int) -> tuple[int, int]:
        """Return (source, sample of that source) of a global sample number."""
        source, index = self._mixture.locate(sample_number)
        epoch, position = divmod(index, self.samples_per_epoch[source])
        return source, permute(position, self.samples_per_epoch[source], self._key(source, epoch))

    def locate_many(self, sample_numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return ``locate`` of every element of a flat array: two int64 arrays of its length."""
        sources, indices = self._mixture.locate_many(sample_numbers)
        epochs, positions = np.divmod(indices, np.array(self.samples_per_epoch, dtype=np.int64)[sources])
        samples = np.empty_like(positions)
        pairs: set[tuple[int, int]] = set(zip(sources.tolist(), epochs.tolist(), strict=True))
        for source, epoch in pairs:
            chosen = (sources == source) & (epochs == epoch)
            key = self._key(source, epoch)
            samples[chosen] = permute_many(positions[chosen], self.samples_per_epoch[source], key)
        return sources, samples

    def _key(self, source: int, epoch: int) -> int:
        return epoch_key(self._seed, ORDER_VERSION, self._fingerprints[source], epoch)
