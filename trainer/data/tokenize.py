"""Corpus → token shards, in parallel, with the same bytes for any number of workers and any number of restarts.

Documents are cut into chunks in one fixed order; worker processes encode chunks; the parent writes the results in
order. Nothing that depends on time or on the number of workers goes into the files. Every few seconds the files are
synced and a journal says how far they are: the same command goes on from there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainer.core import faults
from trainer.core.errors import DataError, Problem
from trainer.data.corpus import Corpus, Position
from trainer.data.corpus_files import Patterns
from trainer.data.corpus_filters import Filters
from trainer.data.encoder import Encoder
from trainer.data.shard_index import ShardPaths
from trainer.data.shard_set_writer import publish_set, remove_partials
from trainer.data.shard_writer import CannotContinueError, tool_version
from trainer.data.tokenize_journal import Journal, Record, finished_from
from trainer.data.tokenize_output import Side, Target, add, check_finished, worth_keeping
from trainer.data.tokenize_workers import Job, Workers, cut

# A chunk ends at whichever comes first; large enough that handing it over costs nothing against encoding it.
_CHUNK_DOCUMENTS = 1024
_CHUNK_CHARACTERS = 1 << 19
_PROGRESS_SECONDS = 0.5
# What a kill costs at most, besides starting again.
_JOURNAL_SECONDS = 5.0


@dataclass(frozen=True)
class Progress:
    """How far ``tokenize`` is."""

    documents: int
    tokens: int
    bytes_done: int
    total_bytes: int | None
    """None if a `datasets` id is read."""
    seconds: float
    tokens_before: int = 0
    """Written by earlier starts of the same command; they say nothing about speed."""
    bytes_before: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Mean since the start."""
        return (self.tokens - self.tokens_before) / self.seconds if self.seconds > 0 else 0.0

    @property
    def remaining_seconds(self) -> float | None:
        """Estimate from the bytes of input that are left; None if unknown."""
        done = self.bytes_done - self.bytes_before
        if not self.total_bytes or done <= 0:
            return None
        return self.seconds * max(0, self.total_bytes - self.bytes_done) / done


@dataclass(frozen=True)
class Tokenized:
    """What ``tokenize`` wrote under one prefix."""

    prefix: str
    num_documents: int
    num_tokens: int
    fingerprint: str
    report: dict[str, Any]
    warnings: tuple[str, ...]


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
    shard_bytes: int | None = None,
    filters: Filters | None = None,
    patterns: Patterns | None = None,
    separator: str | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> list[Tokenized]:
    """Encode every document of ``inputs`` (see ``corpus``) and write token shards; return what was written.

    Documents end with the end-of-document id: the tokenizer's eos token, or the token ``end_of_document``. With
    ``validation_fraction`` each document goes to ``validation_output`` by a hash of its text: adding documents or
    changing their order never moves one to the other side. ``workers`` None: one a core. ``shard_bytes``: a set of
    shards of this size instead of one.

    A killed or interrupted call is continued by the next one with the same arguments (other ``workers`` are the same)
    and inputs; the files are those of an uninterrupted one. ``notice`` is told so, or why it starts over.

    Raises DataError, with nothing written, for inputs or a tokenizer that can't be used: no end-of-document token,
    more than 10 % unknown tokens, or text that is lost.
    """
    _check_arguments(output, workers, validation_fraction, validation_output)
    corpus = Corpus(inputs, text_key=text_key, split=split, filters=filters, patterns=patterns, separator=separator)
    encoder = Encoder.load(tokenizer_path, revision, parse_special_tokens)
    eos_id = _end_of_document(encoder, end_of_document)
    targets = [Target(prefix, shard_bytes, overwrite) for prefix in (output, validation_output) if prefix is not None]
    job = Job(encoder.spec, eos_id, encoder.unk_id, encoder.vocab_size, validation_fraction)
    with closing(Workers(job, workers or _cores())) as pool:
        # They load the tokenizer meanwhile.
        tokenizer_hash = encoder.hash
        options = [text_key, split, separator, asdict(corpus.filters), validation_fraction, _CHUNK_DOCUMENTS]
        places = [[os.path.abspath(target.prefix), target.shard_bytes] for target in targets]
        key = {
            "options": [*options, _CHUNK_CHARACTERS, places, eos_id, encoder.unk_id, parse_special_tokens],
            "inputs": corpus.listing.facts(),
            "tokenizer": [tokenizer_hash, encoder.name, encoder.serialised_hash],
            "software": [tool_version(), version("tokenizers"), version("transformers")],
        }
        run = _Run(corpus, Journal(output, key), targets, progress, notice or _silent)
        return run.run(pool, lambda target, state: Side(target, encoder, tokenizer_hash, eos_id, state))


class _Run:
    """One start of a command: from its journal to the end."""

    def __init__(
        self,
        corpus: Corpus,
        journal: Journal,
        targets: Sequence[Target],
        progress: Callable[[Progress], None] | None,
        notice: Callable[[str], None],
    ) -> None:
        self._corpus, self._journal, self._targets = corpus, journal, targets
        self._progress, self._notice = progress, notice
        self._started = time.monotonic()
        self._before = (0, 0)  # tokens and bytes of earlier starts

    def run(self, pool: Workers, open_side: Callable[[Target, dict[str, Any] | None], Side]) -> list[Tokenized]:
        """Continue or begin, encode everything, and give the files their names."""
        record, reason = self._journal.read()
        if record is not None and record.phase == "publish":
            self._notice("continuing: every document is written, the files get their names")
            return self._publish(record)
        sides = self._continue(record, open_side) if record is not None else None
        if sides is None:
            if self._journal.exists():
                self._notice(f"starting over: {reason or 'the partial files of the interrupted run are damaged'}")
            sides = self._begin(open_side)
        try:
            self._encode(pool, sides)
            self._corpus.require_documents()
            check_finished(sides)
            record = self._finish(sides)
        except BaseException as error:
            keep = self._journal.exists() and worth_keeping(error)
            for side in sides:
                side.close(keep)
            if not keep:
                self._journal.remove()
            raise
        written = self._publish(record)
        for side in sides:
            side.writer.close()
        return written

    def _begin(self, open_side: Callable[[Target, dict[str, Any] | None], Side]) -> list[Side]:
        with ExitStack() as stack:
            sides: list[Side] = []
            for target in self._targets:
                sides.append(open_side(target, None))
                stack.callback(sides[-1].close, keep=False)
            stack.pop_all()
        if self._journal.exists():
            for target in self._targets:
                if target.shard_bytes is None:  # the run before may have written a set
                    remove_partials(target.prefix, kept=set())
            self._journal.remove()
        return sides

    def _continue(
        self, record: Record, open_side: Callable[[Target, dict[str, Any] | None], Side]
    ) -> list[Side] | None:
        """Open the outputs where the record left them; None if they aren't there any more."""
        try:
            position = Position.from_dict(record.position)
            with ExitStack() as stack:
                sides: list[Side] = []
                for target, state in zip(self._targets, record.sides, strict=True):
                    sides.append(open_side(target, state))
                    stack.callback(sides[-1].close, keep=True)
                stack.pop_all()
        except (CannotContinueError, KeyError, TypeError, ValueError):
            return None
        self._corpus.start_at(position)
        self._before = (sum(side.writer.num_tokens for side in sides), position.bytes_done)
        self._notice(f"continuing at document {position.counts.documents + 1:,}")
        return sides

    def _encode(self, pool: Workers, sides: Sequence[Side]) -> None:
        told = saved = time.monotonic()
        shards = self._num_shards(sides)
        position = self._corpus.position()
        for encoded, position in pool.encode(cut(self._corpus, _CHUNK_DOCUMENTS, _CHUNK_CHARACTERS)):
            add(sides, encoded)
            now = time.monotonic()
            if now - saved > _JOURNAL_SECONDS or self._num_shards(sides) != shards:
                saved, shards = now, self._num_shards(sides)
                self._journal.write(Record("encode", position.to_dict(), [side.state() for side in sides]))
                faults.reach("tokenize_journal", rank=0, step=shards)
            if now - told > _PROGRESS_SECONDS:
                told = now
                self._tell(sides, position.bytes_done)
        self._tell(sides, self._corpus.bytes_done)

    def _finish(self, sides: Sequence[Side]) -> Record:
        """Complete the files and record that only their names are missing."""
        counts, waiting = self._corpus.counts, list[dict[str, Any]]()
        facts: dict[str, Any] = {
            "empty_documents": counts.empty,
            "repaired_documents": counts.repaired,
            "skipped_files": counts.skipped_files,
        }
        dropped = {name: getattr(counts, name) for name in ("where", "too_short", "too_long", "excluded_files")}
        if self._corpus.filters.active or counts.excluded_files:
            facts["dropped"] = dropped
        # The training side last: it exists only if the other one does.
        for side in reversed(sides):
            report = {**side.report.to_dict(), **facts}
            finished = side.writer.finish(report)
            warnings = [*side.report.warnings(), *_corpus_warnings(self._corpus)]
            waiting.append({"finished": asdict(finished), "report": report, "warnings": warnings})
        record = Record("publish", {}, waiting)
        self._journal.write(record)
        return record

    def _publish(self, record: Record) -> list[Tokenized]:
        results: list[Tokenized] = []
        for step, side in enumerate(record.sides):
            finished = finished_from(side["finished"])
            faults.reach("tokenize_publish", rank=0, step=step)
            try:
                publish_set(finished)
            except OSError as error:
                problem = Problem(finished.prefix, None, f"can't be written: {error.strerror}", "run the command again")
                raise DataError(problem, title="tokenize") from error
            done = finished.written
            results.insert(
                0,
                Tokenized(
                    finished.prefix,
                    done.num_documents,
                    done.num_tokens,
                    done.fingerprint,
                    side["report"],
                    tuple(side["warnings"]),
                ),
            )
        faults.reach("tokenize_publish", rank=0, step=len(record.sides))
        self._journal.remove()
        return results

    def _tell(self, sides: Sequence[Side], bytes_done: int) -> None:
        if self._progress is None:
            return
        documents = sum(side.writer.num_documents for side in sides)
        tokens = sum(side.writer.num_tokens for side in sides)
        seconds = time.monotonic() - self._started
        self._progress(Progress(documents, tokens, bytes_done, self._corpus.total_bytes, seconds, *self._before))

    @staticmethod
    def _num_shards(sides: Sequence[Side]) -> int:
        return sum(side.writer.num_shards for side in sides)


def _corpus_warnings(corpus: Corpus) -> list[str]:
    counts, warnings = corpus.counts, list[str]()
    if counts.skipped_files:
        shown = ", ".join(counts.skipped_examples)
        warnings.append(f"{counts.skipped_files} files aren't UTF-8 text and were skipped, e.g. {shown}")
    if counts.empty:
        warnings.append(f"{counts.empty} empty documents were skipped")
    if counts.repaired:
        warnings.append(f"{counts.repaired} documents held half a surrogate pair: replaced by U+FFFD")
    dropped = {
        "by --where": counts.where,
        "shorter than --min-characters": counts.too_short,
        "longer than --max-characters": counts.too_long,
        "files by --include and --exclude": counts.excluded_files,
    }
    if any(dropped.values()):
        warnings.append("left out: " + ", ".join(f"{count:,} {why}" for why, count in dropped.items() if count))
    return warnings


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


def _silent(_: str) -> None:
    pass
