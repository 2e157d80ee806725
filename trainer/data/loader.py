"""Feed token shards to a training loop: each rank reads its slice of every global batch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.config.data import DataConfig
from trainer.core.errors import DataError, Problem
from trainer.core.targets import IGNORE_INDEX
from trainer.data.packing import sample_span, samples_in
from trainer.data.sampler import Sampler
from trainer.data.shards import TokenShards


@dataclass(frozen=True)
class MicroBatch:
    """What one rank runs through the model at a time."""

    input_ids: torch.Tensor
    """int64 [micro, S]."""
    targets: torch.Tensor
    """int64 [micro, S]: the token after each input (already shifted), or IGNORE_INDEX."""


class TrainLoader:
    """Read the micro-batches of one data-parallel rank, step after step.

    Micro-batch m of rank r holds the samples ``consumed + (m * data_size + r) * micro_size`` and the
    ``micro_size - 1`` after it: the global batch of a step is the same whatever the number of ranks, the
    micro-batch size or ``data.workers``. The whole state is ``consumed_samples``, one integer.

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
    ) -> None:
        self._accumulation = _accumulation(global_size, micro_size, data_rank, data_size)
        if consumed_samples < 0:
            raise ValueError(f"consumed_samples = {consumed_samples} is below 0")
        self._sources = _open_sources(data, vocab_size)
        weights = [source.weight for source in data.train]
        self._sampler = Sampler(self._sources, weights, seed, data.sequence_length)
        available = sum(self._sampler.samples_per_epoch)
        if available < global_size:
            raise DataError(
                Problem(
                    "batch.global_size",
                    global_size,
                    f"must not exceed the {available} samples of data.train: one step would repeat them",
                    "lower batch.global_size or data.sequence_length, or use more text",
                ),
                title="data",
            )
        self._global_size = global_size
        self._micro_size = micro_size
        self._data_rank, self._data_size = data_rank, data_size
        self._sequence_length = data.sequence_length
        self._vocab_size = vocab_size
        self._consumed = consumed_samples
        self._reader = (
            _ReadAhead(self._read_step, consumed_samples, global_size, data.workers) if data.workers else None
        )

    @property
    def consumed_samples(self) -> int:
        """Samples of all ranks that ``next_step`` has handed out since the start of the run."""
        return self._consumed

    @property
    def fingerprint(self) -> str:
        """Hash of what decides which tokens a sample number names, but for the seed."""
        return self._sampler.fingerprint

    @property
    def proportions(self) -> tuple[float, ...]:
        """The share of samples each source of ``data.train`` really gets."""
        return self._sampler.proportions

    @property
    def notes(self) -> tuple[str, ...]:
        """What can't be checked about the sources, one sentence each."""
        return tuple(f"{source.prefix}: {note}" for source in self._sources for note in source.notes)

    def sample_numbers(self) -> NDArray[np.int64]:
        """Return the global sample numbers of this rank's next step, int64 [accumulation, micro]."""
        return self._numbers(self._consumed)

    def next_step(self) -> list[MicroBatch]:
        """Return this rank's micro-batches of the next step and count its global batch as consumed."""
        batches = self._reader.get() if self._reader else self._read_step(self._consumed)
        self._consumed += self._global_size
        return batches

    def close(self) -> None:
        """Stop reading ahead and close the files."""
        if self._reader:
            self._reader.close()
        for source in self._sources:
            source.close()

    def _numbers(self, first_sample: int) -> NDArray[np.int64]:
        return first_sample + _slice(self._accumulation, self._micro_size, self._data_rank, self._data_size)

    def _read_step(self, first_sample: int) -> list[MicroBatch]:
        numbers = self._numbers(first_sample)
        sources, samples = self._sampler.locate_many(numbers.ravel())
        tokens = np.empty((numbers.size, self._sequence_length + 1), dtype=np.int64)
        for row, source, sample in zip(tokens, sources.tolist(), samples.tolist(), strict=True):
            _read_sample(self._sources[source], sample, self._vocab_size, row)
        return [_micro_batch(part) for part in tokens.reshape(*numbers.shape, -1)]


def validation_batches(
    prefix: str | TokenShards,
    sequence_length: int,
    micro_size: int,
    data_rank: int,
    data_size: int,
    global_size: int,
    batches: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[MicroBatch]:
    """Return the rank's micro-batches of a validation set: in file order, every epoch of it the same.

    Every rank gets the same number of micro-batches; rows past the end of the set are padding (ids 0, every target
    IGNORE_INDEX). ``batches`` counts global batches; None covers every sample. The last tokens of the shards, fewer
    than ``sequence_length`` targets, are not evaluated. Raises DataError at the call, not at the first batch.
    """
    accumulation = _accumulation(global_size, micro_size, data_rank, data_size)
    shards = prefix if isinstance(prefix, TokenShards) else TokenShards(prefix)
    num_samples = samples_in(shards.num_tokens, sequence_length)
    problems = _vocabulary_problems("data.validation", shards, vocab_size)
    if num_samples < 1:
        problems.append(
            Problem(
                f"data.validation: {shards.prefix}",
                f"{shards.num_tokens} tokens",
                f"is too short for one sample of data.sequence_length + 1 = {sequence_length + 1} tokens",
                "lower data.sequence_length, or validate on more text",
            )
        )
    if problems:
        raise DataError(problems, title="data")
    available = -(-num_samples // global_size)
    steps = available if batches is None else min(batches, available)
    mine = _slice(accumulation, micro_size, data_rank, data_size)

    def generate() -> Iterator[MicroBatch]:
        for step in range(steps):
            for numbers in mine + step * global_size:
                tokens = np.zeros((micro_size, sequence_length + 1), dtype=np.int64)
                for row, sample in zip(tokens, numbers.tolist(), strict=True):
                    if sample < num_samples:
                        _read_sample(shards, sample, vocab_size, row)
                batch = _micro_batch(tokens)
                batch.targets[torch.from_numpy(numbers >= num_samples)] = IGNORE_INDEX
                yield batch

    return generate()


class _ReadAhead:
    """A thread that reads the next ``depth`` steps. One thread, one queue: the order can't change."""

    def __init__(self, read: Any, first_sample: int, stride: int, depth: int) -> None:
        self._read, self._stride = read, stride
        self._steps: queue.Queue[list[MicroBatch] | BaseException] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(first_sample,), name="data-read-ahead", daemon=True)
        self._thread.start()

    def get(self) -> list[MicroBatch]:
        if self._stop.is_set():
            raise ValueError("the loader is closed")
        if self._failure is None:
            item = self._steps.get()
            if not isinstance(item, BaseException):
                return item
            self._failure = item
        raise self._failure

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self, first_sample: int) -> None:
        while not self._stop.is_set():
            try:
                item = self._read(first_sample)
            except BaseException as error:  # noqa: BLE001 (raised again by get, in the training thread)
                self._put(error)
                return
            self._put(item)
            first_sample += self._stride

    def _put(self, item: list[MicroBatch] | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._steps.put(item, timeout=0.1)
            except queue.Full:  # the trainer is busy: look whether it wants to stop, then wait on
                continue
            return


def _accumulation(global_size: int, micro_size: int, data_rank: int, data_size: int) -> int:
    if min(global_size, micro_size, data_size) < 1 or not 0 <= data_rank < data_size:
        raise ValueError(f"no such slice: {global_size=}, {micro_size=}, {data_rank=}, {data_size=}")
    if global_size % (micro_size * data_size):
        raise DataError(
            Problem(
                "batch.global_size",
                global_size,
                f"must be a multiple of batch.micro_size x data-parallel ranks = {micro_size} x {data_size}",
            ),
            title="data",
        )
    return global_size // (micro_size * data_size)


def _slice(accumulation: int, micro_size: int, data_rank: int, data_size: int) -> NDArray[np.int64]:
    """Return a rank's sample numbers relative to the first of a global batch, [accumulation, micro]."""
    starts = (np.arange(accumulation, dtype=np.int64) * data_size + data_rank) * micro_size
    return starts[:, None] + np.arange(micro_size, dtype=np.int64)


def _open_sources(data: DataConfig, vocab_size: int | None) -> list[TokenShards]:
    problems: list[Problem] = []
    sources: list[TokenShards] = []
    if data.packing != "documents":
        problems.append(Problem("data.packing", data.packing, "isn't available yet", "use `documents`"))
    if data.mask_documents:
        problems.append(Problem("data.mask_documents", True, "isn't available yet", "leave it out"))
    for i, source in enumerate(data.train):
        try:
            shards = TokenShards(source.path)
        except DataError as error:
            problems += error.problems
            continue
        problems += _vocabulary_problems(f"data.train.{i}", shards, vocab_size)
        sources.append(shards)
    hashes = {shards.tokenizer_hash: shards.prefix for shards in sources if shards.tokenizer_hash}
    if len(hashes) > 1:
        problems.append(
            Problem(
                "data.train",
                list(hashes.values()),
                "mixes shards of different tokenizers: the same id means different text",
                "tokenize all sources with one tokenizer",
            )
        )
    real = [shards.paths.bin.resolve() for shards in sources]
    problems += [
        Problem(
            f"data.train: {shards.prefix}",
            None,
            "is listed twice: both would be read in the same order",
            "list it once with the sum of the weights",
        )
        for i, shards in enumerate(sources)
        if real[i] in real[:i]
    ]
    if problems:
        raise DataError(problems, title="data")
    return sources


def _vocabulary_problems(key: str, shards: TokenShards, vocab_size: int | None) -> list[Problem]:
    if vocab_size is None or shards.vocab_size is None or shards.vocab_size <= vocab_size:
        return []
    return [
        Problem(
            f"{key}: {shards.prefix}",
            f"{shards.vocab_size} ids",
            f"was written with a larger vocabulary than the model's vocab_size = {vocab_size}",
            "raise the model's vocab_size, or tokenize with the model's tokenizer",
        )
    ]


def _read_sample(shards: TokenShards, sample: int, vocab_size: int | None, row: NDArray[np.int64]) -> None:
    """Copy one sample into ``row`` [S + 1]; refuse ids that a GPU would answer with an opaque assertion."""
    start, count = sample_span(sample, len(row) - 1)
    row[:] = shards.read(start, count)
    if int(row.min()) >= 0 and (vocab_size is None or int(row.max()) < vocab_size):
        return
    place = int(np.flatnonzero((row < 0) | (row >= (vocab_size or 2**63 - 1)))[0])
    raise DataError(
        Problem(
            f"{shards.paths.bin} at token {start + place} (byte {(start + place) * shards.dtype.itemsize})",
            int(row[place]),
            f"token id outside 0..{'' if vocab_size is None else vocab_size - 1}, the model's vocabulary",
            "were these shards made with another tokenizer? `trainer data verify PREFIX --full` looks for damage",
        ),
        title="data",
    )


def _micro_batch(tokens: NDArray[np.int64]) -> MicroBatch:
    whole = torch.from_numpy(tokens)  # [micro, S + 1]
    # Copies: of a single row, `contiguous` would return two overlapping views of the same memory.
    return MicroBatch(*(part.clone(memory_format=torch.contiguous_format) for part in (whole[:, :-1], whole[:, 1:])))
