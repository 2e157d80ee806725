"""Corpus → token shards, in parallel, with the same bytes for any number of workers.

Documents are cut into chunks in one fixed order; worker processes encode chunks; the parent writes the results in
order. Nothing that depends on time or on the number of workers goes into the files.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from trainer.core.errors import DataError, Problem
from trainer.data.corpus import Corpus
from trainer.data.encoder import Encoder, EncoderSpec
from trainer.data.shard_index import ShardPaths
from trainer.data.shard_set_writer import SetWriter
from trainer.data.token_report import ROUND_TRIP_CHARACTERS, TokenReport

# A chunk ends at whichever comes first; large enough that handing it over costs nothing against encoding it.
_CHUNK_DOCUMENTS = 256
_CHUNK_CHARACTERS = 1 << 19
# Chunks under way for each worker: bounds memory, keeps everyone busy while one chunk is slow.
_CHUNKS_PER_WORKER = 3
_PROGRESS_SECONDS = 0.5


@dataclass(frozen=True)
class Progress:
    """How far ``tokenize`` is."""

    documents: int
    tokens: int
    bytes_done: int
    total_bytes: int | None
    """None if a `datasets` id is read."""
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Mean since the start."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def remaining_seconds(self) -> float | None:
        """Estimate from the bytes of input that are left; None if unknown."""
        if not self.total_bytes or not self.bytes_done:
            return None
        return self.seconds * max(0.0, self.total_bytes / self.bytes_done - 1)


@dataclass(frozen=True)
class Tokenized:
    """What ``tokenize`` wrote under one prefix."""

    prefix: str
    num_documents: int
    num_tokens: int
    fingerprint: str
    report: dict[str, Any]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Encoded:
    """One chunk, encoded: documents end to end."""

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]
    text_bytes: NDArray[np.int64]
    unknown: NDArray[np.int64]
    to_validation: NDArray[np.bool_]
    sample: tuple[str, str]
    """Beginning of the first document, and the same after encoding and decoding."""


@dataclass(frozen=True)
class _Job:
    """What a worker needs to know, once."""

    spec: EncoderSpec
    eos_id: int
    unk_id: int | None
    validation_fraction: float


def tokenize(
    inputs: Sequence[str],
    tokenizer_path: str,
    output: str,
    workers: int | None = None,
    text_key: str = "text",
    split: str = "train",
    *,
    revision: str | None = None,
    end_of_document: str | None = None,
    parse_special_tokens: bool = False,
    validation_fraction: float = 0.0,
    validation_output: str | None = None,
    overwrite: bool = False,
    shard_bytes: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> list[Tokenized]:
    """Encode every document of ``inputs`` (see ``corpus``) and write token shards; return what was written.

    Documents end with the end-of-document id: the tokenizer's eos token, or the token ``end_of_document``. With
    ``validation_fraction`` each document goes to ``validation_output`` by a hash of its text: adding documents or
    changing their order never moves one to the other side. ``workers`` None: one a core. ``shard_bytes``: a set of
    shards of this size instead of one.

    Raises DataError, with nothing written, for inputs or a tokenizer that can't be used: no end-of-document token,
    more than 10 % unknown tokens, or text that is lost.
    """
    _check_arguments(output, workers, validation_fraction, validation_output)
    corpus = Corpus(inputs, text_key=text_key, split=split)
    encoder = Encoder.load(tokenizer_path, revision, parse_special_tokens)
    job = _Job(encoder.spec, _end_of_document(encoder, end_of_document), encoder.unk_id, validation_fraction)
    outputs = [output] if validation_output is None else [output, validation_output]
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                SetWriter(
                    prefix,
                    encoder.vocab_size,
                    shard_bytes=shard_bytes,
                    end_of_document_id=job.eos_id,
                    tokenizer_name=encoder.name,
                    tokenizer_hash=encoder.hash,
                    overwrite=overwrite,
                )
            )
            for prefix in outputs
        ]
        reports = [TokenReport(tokenizer_path, encoder.vocab_size) for _ in outputs]
        _encode_all(corpus, job, workers or _cores(), writers, reports, progress)
        corpus.require_documents()
        return _commit(corpus, writers, reports)


def _encode_all(
    corpus: Corpus,
    job: _Job,
    workers: int,
    writers: list[SetWriter],
    reports: list[TokenReport],
    progress: Callable[[Progress], None] | None,
) -> None:
    start = last = time.monotonic()

    def tell() -> None:
        if progress is not None:
            documents, tokens = (sum(getattr(w, name) for w in writers) for name in ("num_documents", "num_tokens"))
            seconds = time.monotonic() - start
            progress(Progress(documents, tokens, corpus.bytes_done, corpus.total_bytes, seconds))

    for encoded in _encode(_chunks(corpus), job, workers):
        owner = np.repeat(encoded.to_validation, encoded.lengths)
        for side, (writer, report) in enumerate(zip(writers, reports, strict=True)):
            chosen = encoded.to_validation == bool(side)
            tokens = encoded.tokens[owner == bool(side)]
            writer.add_many(tokens, encoded.lengths[chosen])
            report.add(tokens, int(encoded.text_bytes[chosen].sum()), int(encoded.unknown[chosen].sum()))
            report.add_sample(*encoded.sample)
            report.refuse_broken(final=False)
        if time.monotonic() - last > _PROGRESS_SECONDS:
            last = time.monotonic()
            tell()
    tell()


def _commit(corpus: Corpus, writers: list[SetWriter], reports: list[TokenReport]) -> list[Tokenized]:
    for writer, report in zip(writers, reports, strict=True):
        if not writer.num_documents:
            fix = "change --validation-fraction, or use more documents"
            raise DataError(Problem("output", writer.prefix, "no document fell to this side of the split", fix))
        report.refuse_broken(final=True)
    facts = {
        "empty_documents": corpus.empty_documents,
        "repaired_documents": corpus.repaired_documents,
        "skipped_files": len(corpus.skipped_files),
    }
    written: list[Tokenized] = []
    # The training side last: it exists only if the other one does.
    for writer, report in reversed(list(zip(writers, reports, strict=True))):
        content = {**report.to_dict(), **facts}
        sidecar = writer.commit(content)
        warnings = (*report.warnings(), *_corpus_warnings(corpus))
        written.insert(
            0,
            Tokenized(writer.prefix, sidecar.num_documents, sidecar.num_tokens, sidecar.fingerprint, content, warnings),
        )
    return written


def _corpus_warnings(corpus: Corpus) -> list[str]:
    warnings: list[str] = []
    if corpus.skipped_files:
        shown = ", ".join(corpus.skipped_files[:3])
        warnings.append(f"{len(corpus.skipped_files)} files aren't UTF-8 text and were skipped, e.g. {shown}")
    if corpus.empty_documents:
        warnings.append(f"{corpus.empty_documents} empty documents were skipped")
    if corpus.repaired_documents:
        warnings.append(f"{corpus.repaired_documents} documents held half a surrogate pair: replaced by U+FFFD")
    return warnings


def _chunks(corpus: Corpus) -> Iterator[list[str]]:
    chunk: list[str] = []
    characters = 0
    for document in corpus:
        chunk.append(document.text)
        characters += len(document.text)
        if len(chunk) >= _CHUNK_DOCUMENTS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _encode(chunks: Iterator[list[str]], job: _Job, workers: int) -> Iterator[_Encoded]:
    """Yield the encoded chunks in the order of the chunks."""
    if workers == 1:
        encoder = Encoder.build(job.spec)
        for chunk in chunks:
            yield _encode_chunk(encoder, job, chunk)
        return
    # forkserver: fork would copy a process whose threads (tokenizers, arrow) may hold locks.
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job,)) as pool:
        pending: deque[Future[_Encoded]] = deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(_encode_in_worker, chunk))
                if len(pending) >= workers * _CHUNKS_PER_WORKER:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            fix = "was it killed for its memory? use fewer --workers"
            raise DataError(Problem("workers", workers, "a worker process died", fix), title="tokenize") from None
        finally:
            for future in pending:
                future.cancel()


_worker: tuple[Encoder, _Job] | None = None


def _start_worker(job: _Job) -> None:
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


def _encode_in_worker(texts: list[str]) -> _Encoded:
    assert _worker is not None
    return _encode_chunk(*_worker, texts)


def _encode_chunk(encoder: Encoder, job: _Job, texts: list[str]) -> _Encoded:
    documents = [np.array([*ids, job.eos_id], dtype=np.int32) for ids in encoder.encode_batch(texts)]
    raw = [text.encode() for text in texts]
    # The hash is a number below 2^64 drawn once for each text: below the fraction goes to validation.
    limit = int(job.validation_fraction * 2**64)
    beginning = texts[0][:ROUND_TRIP_CHARACTERS]
    return _Encoded(
        tokens=np.concatenate(documents),
        lengths=np.array([len(ids) for ids in documents], dtype=np.int64),
        text_bytes=np.array([len(text) for text in raw], dtype=np.int64),
        unknown=np.array(
            [0 if job.unk_id is None else int((ids[:-1] == job.unk_id).sum()) for ids in documents], dtype=np.int64
        ),
        to_validation=np.array([xxhash.xxh3_64_intdigest(text) < limit for text in raw], dtype=np.bool_),
        sample=(beginning, encoder.decode(encoder.encode_batch([beginning])[0])),
    )


def _end_of_document(encoder: Encoder, token: str | None) -> int:
    found = encoder.eos_id if token is None else encoder.id_of(token)
    if found is None:
        rule = "has no eos token" if token is None else f"has no token {token!r}"
        fix = "name the token that ends a document with --end-of-document TOKEN"
        raise DataError(Problem("tokenizer", encoder.spec.path, rule, fix), title="tokenize")
    return found


def _check_arguments(output: str, workers: int | None, fraction: float, validation_output: str | None) -> None:
    problems: list[Problem] = []
    if workers is not None and workers < 1:
        problems.append(Problem("workers", workers, "must be at least 1"))
    if not 0 <= fraction < 1:
        problems.append(Problem("validation-fraction", fraction, "must be at least 0 and below 1"))
    if (fraction > 0) != (validation_output is not None):
        rule = "--validation-fraction and --validation-output belong together"
        problems.append(Problem("validation-output", validation_output, rule, "give both or neither"))
    if validation_output is not None and _same_output(output, validation_output):
        problems.append(Problem("validation-output", validation_output, "must differ from --output"))
    for name, prefix in (("output", output), ("validation-output", validation_output)):
        if prefix is not None and (not Path(prefix).name or Path(prefix).is_dir()):
            rule = "must be the prefix of three files, and names a directory"
            problems.append(Problem(name, prefix, rule, f"for example {Path(prefix) / 'tokens'}"))
    if problems:
        raise DataError(problems, title="tokenize")


def _same_output(one: str, other: str) -> bool:
    return ShardPaths.of(one).bin.resolve() == ShardPaths.of(other).bin.resolve()


def _cores() -> int:
    return len(os.sched_getaffinity(0))
