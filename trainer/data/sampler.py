"""Global sample number → (source, sample): mixture, then epoch, then order within the epoch. Torch-free.

The whole state is how many samples were consumed: one integer. Ranks and workers only slice the sequence of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.config.data import DataConfig
from trainer.core.errors import DataError, Problem
from trainer.data.mixing import MIXING_VERSION, Mixture, Stage
from trainer.data.order import ORDER_VERSION, epoch_key, permute_many
from trainer.data.shard_sidecar import fingerprint_of

Ints = NDArray[np.int64]


class Sampler:
    """Order of all samples of a run: a pure function of the seed, the sources, their weights and how they are packed.

    ``fingerprints`` and ``samples_per_epoch`` belong to the sources of ``data.train``, in order; ``packing`` names
    what a sample is. Raises DataError for a source without a sample and for weights that can't be used.
    """

    def __init__(
        self,
        data: DataConfig,
        seed: int,
        fingerprints: Sequence[str],
        samples_per_epoch: Sequence[int],
    ) -> None:
        self.samples_per_epoch = tuple(samples_per_epoch)
        """Samples in one pass over each source."""
        self._data, self._seed = data, seed
        self._fingerprints = tuple(fingerprints)
        self._refuse_short()
        self._mixture = Mixture(_stages(data, self.samples_per_epoch))

    @property
    def budget(self) -> int | None:
        """Samples that the budgets of the sources add up to; None if they have weights."""
        budgets = _budgets(self._data, self.samples_per_epoch)
        return None if budgets is None else math.ceil(sum(budgets))

    def counts_before(self, sample_number: int) -> tuple[int, ...]:
        """Return how many of the first ``sample_number`` samples come from each source."""
        return self._mixture.counts_before(sample_number)

    def fingerprint(self, consumed_samples: int) -> str:
        """Return a hash of what decided which tokens the first ``consumed_samples`` named, but for the seed.

        Stages that lie ahead, and sources that only they read, don't count: they may still be changed.
        """
        content: list[object] = [ORDER_VERSION, MIXING_VERSION, self._data.packing, self._data.sequence_length]
        for i, stage in enumerate(self._mixture.stages):
            if i and stage.first_sample >= consumed_samples:
                break
            slots = self._mixture.slots(i)
            read = [(self._fingerprints[j], slots[j]) for j in range(len(slots)) if slots[j]]
            content.append([stage.first_sample, read])
        return fingerprint_of(content)

    def locate(self, sample_number: int) -> tuple[int, int, int]:
        """Return (source, sample of that source, epoch) of a global sample number."""
        source, sample, epoch = self.locate_many(np.array([sample_number], dtype=np.int64))
        return int(source[0]), int(sample[0]), int(epoch[0])

    def locate_many(self, sample_numbers: Ints) -> tuple[Ints, Ints, Ints]:
        """Return ``locate`` of every element of a flat array: three int64 arrays of its length."""
        sources, indices = self._mixture.locate_many(sample_numbers)
        epochs, samples = np.divmod(indices, np.array(self.samples_per_epoch, dtype=np.int64)[sources])
        pairs: set[tuple[int, int]] = set(zip(sources.tolist(), epochs.tolist(), strict=True))
        for source, epoch in pairs:
            chosen = slice(None) if len(pairs) == 1 else (sources == source) & (epochs == epoch)
            key = epoch_key(self._seed, ORDER_VERSION, self._fingerprints[source], epoch)
            samples[chosen] = permute_many(samples[chosen], self.samples_per_epoch[source], key)
        return sources, samples, epochs

    def _refuse_short(self) -> None:
        length = self._data.sequence_length
        problems = [
            Problem(
                f"data.train.{i}.path",
                self._data.train[i].path,
                f"is too short for one sample of data.sequence_length + 1 = {length + 1} tokens",
                "lower data.sequence_length, or use more text",
            )
            for i, count in enumerate(self.samples_per_epoch)
            if count < 1
        ]
        if problems:
            raise DataError(problems, title="data")


def _budgets(data: DataConfig, samples_per_epoch: Sequence[int]) -> list[float] | None:
    """Return the samples each source is to give in the whole run; None if the sources have weights."""
    if not data.train[0].has_budget:
        return None
    return [
        count * source.epochs if source.epochs is not None else (source.tokens or 0) / data.sequence_length
        for source, count in zip(data.train, samples_per_epoch, strict=True)
    ]


def _stages(data: DataConfig, samples_per_epoch: Sequence[int]) -> list[Stage]:
    budgets = _budgets(data, samples_per_epoch)
    weights = budgets or [1.0 if source.weight is None else source.weight for source in data.train]
    stages = [Stage(0, tuple(weights))]
    labels = [source.label for source in data.train]
    for stage in data.stages:
        first = math.ceil(stage.after_tokens / data.sequence_length)
        stages.append(Stage(first, tuple(stage.weights.get(label, 0.0) for label in labels)))
    return stages
