"""Feed token shards to a training loop: each rank reads its slice of every global batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import starmap

import numpy as np
from numpy.typing import NDArray

from trainer.config.batch_schedule import batch_size
from trainer.config.data import DataConfig
from trainer.config.parallel import BatchConfig, BatchWarmupConfig
from trainer.core.errors import DataError, Problem
from trainer.core.targets import IGNORE_INDEX
from trainer.data.batches import MicroBatch, Rows, digest_rows, mask_targets, number_documents
from trainer.data.packing import Ints, Segments
from trainer.data.read_ahead import ReadAhead
from trainer.data.sampler import Sampler
from trainer.data.sources import Source, open_source, open_train_sources

_INDEX = -1
"""Stands for a block where a shard's index or side-car is what is damaged."""
_PLANNED_SAMPLES = 1024
"""Samples of this rank that are located together."""


class TrainLoader:
    """Read the micro-batches of one data-parallel rank, step after step.

    Micro-batch m of rank r holds the samples ``consumed + (m * data_size + r) * micro_size`` and the
    ``micro_size - 1`` after it: the global batch of a step is the same whatever the number of ranks, the
    micro-batch size or ``data.workers``. The position is ``consumed_samples``, one integer; ``steps_done`` only says
    how far a ``warmup`` of the batch size is, which cuts the same sequence of samples into other steps.

    Raises DataError with every problem of the sources, and on a token id that the model has no row for.
    """

    def __init__(
        self,
        data: DataConfig,
        seed: int,
        global_size: int,
        micro_size: int,
        data_rank: int,
        data_size: int,
        consumed_samples: int = 0,
        vocab_size: int | None = None,
        warmup: BatchWarmupConfig | None = None,
        steps_done: int = 0,
    ) -> None:
        _accumulation(global_size, micro_size, data_rank, data_size)
        if min(consumed_samples, steps_done) < 0:
            raise ValueError(f"no such position: {consumed_samples=}, {steps_done=}")
        self._data = data
        self._reader = SampleReader(data, vocab_size)
        self.sources = open_train_sources(data, vocab_size)
        counts = [source.packing.num_samples for source in self.sources]
        self.sampler = Sampler(data, seed, [source.shards.fingerprint for source in self.sources], counts)
        if sum(counts) < global_size:
            rule = f"must not exceed the {sum(counts)} samples of data.train: one step would repeat them"
            fix = "lower batch.global_size or data.sequence_length, or use more text"
            raise DataError(Problem("batch.global_size", global_size, rule, fix), title="data")
        self._batch = BatchConfig(global_size=global_size, micro_size=micro_size, warmup=warmup)
        self._data_rank, self._data_size = data_rank, data_size
        self._consumed, self._steps_done = consumed_samples, steps_done
        self._ahead: ReadAhead[list[MicroBatch]] | None = None
        self._planned: dict[int, tuple[Ints, Ints, Ints]] = {}

    @property
    def consumed_samples(self) -> int:
        """Samples of all ranks that ``next_step`` has handed out since the start of the run."""
        return self._consumed

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the sources, in the order of ``data.train``."""
        return tuple(source.label for source in self.sources)

    @property
    def notes(self) -> tuple[str, ...]:
        """What can't be checked about the sources, one sentence each."""
        return tuple(f"{source.shards.path}: {note}" for source in self.sources for note in source.shards.notes)

    def check_blocks(self, rank: int, world_size: int) -> list[tuple[int, int, int, str]]:
        """Read this rank's share of the blocks that ``data.integrity`` wants checked.

        Returns (source, shard, block, what is wrong) of each that fails. Give every rank's to ``exclude``.
        """
        full = self._data.integrity == "full"
        found: list[tuple[int, int, int, str]] = []
        for i, source in enumerate(self.sources):
            try:
                blocks = source.shards.check_blocks(rank, world_size, full)
            except DataError as error:  # a side-car that can't be read
                blocks = [(0, _INDEX, str(problem)) for problem in error.problems]
            found += [(i, shard, block, message) for shard, block, message in blocks]
            found += [(i, shard, _INDEX, message) for shard, message in source.shards.check_index(rank, world_size)]
        return found

    def exclude(self, corrupt: Sequence[tuple[int, int, int, str]]) -> None:
        """Act on the corrupt blocks that all ranks found together: the same list on every rank.

        Raises DataError under ``data.on_corrupt: stop``; else samples that touch them are left out of the loss.
        """
        # Without its index or side-car nothing can be said about a shard: there is nothing to skip.
        if corrupt and (self._data.on_corrupt == "stop" or any(block == _INDEX for _, _, block, _ in corrupt)):
            fix = "restore the file from a copy, or set data.on_corrupt: skip to train without these sequences"
            problems = [
                Problem(f"data.train.{i}.path", self._data.train[i].path, text, fix) for i, _, _, text in corrupt
            ]
            raise DataError(problems, title="corrupt token shards")
        for i, source in enumerate(self.sources):
            source.shards.mark_corrupt([(shard, block) for j, shard, block, _ in corrupt if j == i])

    def sample_numbers(self) -> NDArray[np.int64]:
        """Return the global sample numbers of this rank's next step, int64 [accumulation, micro]."""
        return self._numbers(self._steps_done + 1, self._consumed)

    def next_step(self) -> list[MicroBatch]:
        """Return this rank's micro-batches of the next step and count its global batch as consumed."""
        if self._data.workers and self._ahead is None:
            upcoming = self._upcoming(self._steps_done + 1, self._consumed)
            self._ahead = ReadAhead(starmap(self._read_step, upcoming), self._data.workers)
        batches = self._ahead.get() if self._ahead else self._read_step(self._steps_done + 1, self._consumed)
        self._steps_done += 1
        self._consumed += batch_size(self._batch, self._steps_done)
        return batches

    def seek(self, consumed_samples: int, steps_done: int) -> None:
        """Go on at another position: what ``next_step`` reads is step ``steps_done`` + 1."""
        if self._ahead:
            self._ahead.close()
        self._ahead = None
        self._planned.clear()
        self._consumed, self._steps_done = consumed_samples, steps_done

    def close(self) -> None:
        """Stop reading ahead and close the files."""
        if self._ahead:
            self._ahead.close()
        for source in self.sources:
            source.shards.close()

    def _upcoming(self, step: int, first_sample: int) -> Iterator[tuple[int, int]]:
        """Yield (step, its first sample) from a step on, without end."""
        while True:
            yield step, first_sample
            first_sample += batch_size(self._batch, step)
            step += 1

    def _numbers(self, step: int, first_sample: int) -> NDArray[np.int64]:
        micro, rank, size = self._batch.micro_size, self._data_rank, self._data_size
        accumulation = _accumulation(batch_size(self._batch, step), micro, rank, size)
        return first_sample + _slice(accumulation, micro, rank, size)

    def _read_step(self, step: int, first_sample: int) -> list[MicroBatch]:
        numbers, sources, samples = self._plan(step, first_sample)
        rows = self._reader.read(self.sources, sources, samples, numbers)
        return rows.micro_batches(self._batch.micro_size)

    def _plan(self, step: int, first_sample: int) -> tuple[Ints, Ints, Ints]:
        """Return (numbers, sources, samples of their source) of a step; located for several steps at once.

        The permutation costs 90 us a call, however few samples are asked for.
        """
        if first_sample not in self._planned:
            planned: dict[int, Ints] = {}
            count = 0
            for later, first in self._upcoming(step, first_sample):
                planned[first] = self._numbers(later, first).ravel()
                count += planned[first].size
                if count >= _PLANNED_SAMPLES:
                    break
            ends = np.cumsum([numbers.size for numbers in planned.values()])[:-1]
            sources, samples, _ = self.sampler.locate_many(np.concatenate(list(planned.values())))
            parts = zip(planned.values(), np.split(sources, ends), np.split(samples, ends), strict=True)
            self._planned = dict(zip(planned, parts, strict=True))
        return self._planned[first_sample]


class SampleReader:
    """Turn samples of sources into rows that a model can be given."""

    def __init__(self, data: DataConfig, vocab_size: int | None) -> None:
        self._data, self._vocab_size = data, vocab_size

    def read(self, opened: Sequence[Source], sources: Ints, samples: Ints, numbers: Ints) -> Rows:
        """Return the rows of samples; ``numbers`` are their global numbers, which their digests are bound to."""
        length = self._data.sequence_length
        tokens = np.empty((samples.size, length + 1), dtype=np.int64)
        corrupt = np.zeros(samples.size, dtype=np.bool_)
        targets = np.empty((samples.size, length), dtype=np.int64)
        masked = self._data.mask_documents
        positions = np.empty_like(targets) if masked else None
        documents = np.empty_like(targets) if masked else None
        for source in np.unique(sources).tolist():
            mine = np.flatnonzero(sources == source)
            part = tokens if mine.size == samples.size else np.empty((mine.size, length + 1), dtype=np.int64)
            segments, bad = self._fill(opened[source], samples[mine], part)
            if part is not tokens:
                tokens[mine] = part
            corrupt[mine] = bad
            wanted = part[:, 1:].copy()
            if segments is not None:
                mask_targets(wanted, segments, self._data.trains_boundaries)
                if positions is not None and documents is not None:
                    positions[mine], documents[mine] = number_documents(mine.size, length, segments)
            targets[mine] = wanted
        targets[corrupt] = IGNORE_INDEX
        digests = digest_rows(tokens, numbers)
        return Rows(np.ascontiguousarray(tokens[:, :-1]), targets, positions, documents, sources, digests, corrupt)

    def _fill(self, source: Source, samples: Ints, out: Ints) -> tuple[Segments | None, NDArray[np.bool_]]:
        wanted = self._data.mask_documents or not self._data.trains_boundaries
        bad = np.zeros(samples.size, dtype=np.bool_)
        try:
            return source.packing.fill(samples, out, self._vocab_size, wanted), bad
        except DataError:
            if self._data.on_corrupt == "stop":
                raise
        # Row by row, to find the ones that can't be read: they become zeros, which no target counts.
        for i in range(samples.size):
            try:
                source.packing.fill(samples[i : i + 1], out[i : i + 1], self._vocab_size, False)
            except DataError:
                out[i], bad[i] = 0, True
        wanted = wanted or source.packing.pads
        return source.packing.segments(samples) if wanted else None, bad


def validation_batches(
    data: DataConfig,
    path: str,
    micro_size: int,
    data_rank: int,
    data_size: int,
    global_size: int,
    batches: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[MicroBatch]:
    """Return the rank's micro-batches of a validation set: in file order, packed and masked like training data.

    Every rank gets the same number of micro-batches; rows past the end of the set are padding (ids 0, every target
    IGNORE_INDEX). ``batches`` counts global batches; None covers every sample. The last tokens of the shards, fewer
    than ``sequence_length`` targets, are not evaluated. Raises DataError at the call, not at the first batch.
    """
    accumulation = _accumulation(global_size, micro_size, data_rank, data_size)
    source = open_source("data.validation", path, data.packing, data.sequence_length, vocab_size)
    num_samples = source.packing.num_samples
    if num_samples < 1:
        rule = f"is too short for one sample of data.sequence_length + 1 = {data.sequence_length + 1} tokens"
        fix = "lower data.sequence_length, or validate on more text"
        raise DataError(Problem("data.validation", path, rule, fix), title="data")
    available = -(-num_samples // global_size)
    steps = available if batches is None else min(batches, available)
    mine = _slice(accumulation, micro_size, data_rank, data_size)
    reader = SampleReader(data, vocab_size)

    def generate() -> Iterator[MicroBatch]:
        for step in range(steps):
            for numbers in mine + step * global_size:
                # Beyond the end any sample will do: none of its targets counts.
                samples = np.minimum(numbers, num_samples - 1)
                rows = reader.read([source], np.zeros_like(samples), samples, numbers)
                rows.targets[numbers >= num_samples] = IGNORE_INDEX
                yield from rows.micro_batches(micro_size)
        source.shards.close()

    return generate()


def _accumulation(global_size: int, micro_size: int, data_rank: int, data_size: int) -> int:
    if min(global_size, micro_size, data_size) < 1 or not 0 <= data_rank < data_size:
        raise ValueError(f"no such slice: {global_size=}, {micro_size=}, {data_rank=}, {data_size=}")
    if global_size % (micro_size * data_size):
        rule = f"must be a multiple of batch.micro_size x data-parallel ranks = {micro_size} x {data_size}"
        raise DataError(Problem("batch.global_size", global_size, rule), title="data")
    return global_size // (micro_size * data_size)


def _slice(accumulation: int, micro_size: int, data_rank: int, data_size: int) -> NDArray[np.int64]:
    """Return a rank's sample numbers relative to the first of a global batch, [accumulation, micro]."""
    starts = (np.arange(accumulation, dtype=np.int64) * data_size + data_rank) * micro_size
    return starts[:, None] + np.arange(micro_size, dtype=np.int64)
