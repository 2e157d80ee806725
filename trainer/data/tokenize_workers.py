"""Encode chunks of texts in worker processes, and give them back in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from trainer.core.errors import DataError, Problem
from trainer.data.corpus import Corpus, Position
from trainer.data.encoder import Encoder, EncoderSpec
from trainer.data.token_report import ROUND_TRIP_CHARACTERS

# Chunks under way for each worker: bounds memory, keeps everyone busy while one chunk is slow.
_CHUNKS_PER_WORKER = 3


@dataclass(frozen=True)
class Chunk:
    """Texts that are encoded together."""

    texts: list[str]
    position: Position
    """Of the corpus, behind the last of them."""


@dataclass(frozen=True)
class Encoded:
    """One chunk, encoded: documents end to end."""

    tokens: NDArray[np.integer[Any]]
    lengths: NDArray[np.int64]
    text_bytes: NDArray[np.int64]
    unknown: NDArray[np.int64]
    to_validation: NDArray[np.bool_]
    sample: tuple[str, str]
    """Beginning of the first document, and the same after encoding and decoding."""


@dataclass(frozen=True)
class Job:
    """What a worker needs to know, once."""

    spec: EncoderSpec
    eos_id: int
    unk_id: int | None
    vocab_size: int
    validation_fraction: float


def cut(corpus: Corpus, num_documents: int, num_characters: int) -> Iterator[Chunk]:
    """Yield the texts of a corpus in chunks that end at whichever limit comes first."""
    texts: list[str] = []
    characters = 0
    for text in corpus:
        texts.append(text)
        characters += len(text)
        if len(texts) >= num_documents or characters >= num_characters:
            yield Chunk(texts, corpus.position())
            texts, characters = [], 0
    if texts:
        yield Chunk(texts, corpus.position())


class Workers:
    """Processes that encode; with one, this process does it itself. They start at once: loading takes a second."""

    def __init__(self, job: Job, count: int) -> None:
        self._job, self._count = job, count
        self._pool: ProcessPoolExecutor | None = None
        if count == 1:
            return
        # forkserver: fork would copy a process whose threads (tokenizers, arrow) may hold locks.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "tokenizers"])
        self._pool = ProcessPoolExecutor(count, context, initializer=_start_worker, initargs=(job,))
        for _ in range(count):  # each submission starts one process
            self._pool.submit(_nothing)

    def encode(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Encoded, Position]]:
        """Yield the encoded chunks in the order of the chunks. Raises DataError if a worker dies."""
        if self._pool is None:
            encoder = Encoder.build(self._job.spec)
            for chunk in chunks:
                yield encode_texts(encoder, self._job, chunk.texts), chunk.position
            return
        pending: deque[tuple[Future[Encoded], Position]] = deque()
        try:
            for chunk in chunks:
                pending.append((self._pool.submit(_encode_in_worker, chunk.texts), chunk.position))
                if len(pending) >= self._count * _CHUNKS_PER_WORKER:
                    future, position = pending.popleft()
                    yield future.result(), position
            while pending:
                future, position = pending.popleft()
                yield future.result(), position
        except BrokenProcessPool as error:
            fix = "was it killed for its memory? use fewer --workers"
            raise DataError(Problem("workers", self._count, "a worker process died", fix), title="tokenize") from error
        finally:
            for future, _ in pending:
                future.cancel()

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


_worker: tuple[Encoder, Job] | None = None


def _start_worker(job: Job) -> None:
    global _worker
    # One thread each: the processes are the parallelism that was asked for.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops the workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker = (Encoder.build(job.spec), job)


def _exit_with_parent() -> None:
    """End this worker when its parent is killed: it holds both ends of its queue and would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _nothing() -> None:
    pass


def _encode_in_worker(texts: list[str]) -> Encoded:
    assert _worker is not None
    return encode_texts(*_worker, texts)


def encode_texts(encoder: Encoder, job: Job, texts: list[str]) -> Encoded:
    """Encode texts, each with the end-of-document id behind it."""
    documents = encoder.encode_batch(texts)
    for ids in documents:
        ids.append(job.eos_id)
    lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
    tokens = np.fromiter(chain.from_iterable(documents), dtype=np.int32, count=int(lengths.sum()))
    raw = [text.encode() for text in texts]
    # The hash is a number below 2^64 drawn once for each text: below the fraction goes to validation.
    limit = int(job.validation_fraction * 2**64)
    to_validation = [xxhash.xxh3_64_intdigest(text) < limit for text in raw] if limit else [False] * len(raw)
    beginning = texts[0][:ROUND_TRIP_CHARACTERS]
    return Encoded(
        tokens=tokens.astype(np.uint16) if job.vocab_size <= 1 << 16 else tokens,
        lengths=lengths,
        text_bytes=np.fromiter(map(len, raw), dtype=np.int64, count=len(raw)),
        unknown=_unknown(tokens, lengths, job),
        to_validation=np.array(to_validation, dtype=np.bool_),
        sample=(beginning, encoder.decode(encoder.encode_batch([beginning])[0])),
    )


def _unknown(tokens: NDArray[np.int32], lengths: NDArray[np.int64], job: Job) -> NDArray[np.int64]:
    """Return the number of unknown tokens of each document; its end, which may be the same id, doesn't count."""
    if job.unk_id is None:
        return np.zeros(lengths.size, dtype=np.int64)
    ends = np.cumsum(lengths)
    unknown = tokens == job.unk_id
    unknown[ends - 1] = False
    return np.add.reduceat(unknown, ends - lengths, dtype=np.int64)
