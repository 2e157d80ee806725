"""Documents of a corpus, in one fixed order: text files, JSON Lines, Parquet, Arrow, directories, `datasets` ids.

- ``.jsonl`` / ``.ndjson``: a line is an object, its ``text_key`` a document;
- ``.parquet``, ``.arrow`` (file or stream), and a directory that ``datasets`` saved: a row is a document;
- any other directory: everything below it, sorted by name; hidden entries and ``__pycache__`` are left out;
- any other file is one document of UTF-8 text, or several between separators. One that isn't text is refused when it
  was named, and skipped and counted when it was found in a directory;
- text and JSON Lines may be compressed, ``.gz`` or ``.zst``;
- what doesn't exist and looks like an id (``name``, ``owner/name``, ``owner/name:configuration``) is loaded by
  ``datasets``.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.core.errors import DataError, Problem
from trainer.data.corpus_files import Kind, Patterns, Source, find_sources, refused
from trainer.data.corpus_filters import Filters
from trainer.data.corpus_rows import READ_ERRORS, Columns, NotTextError, Reader, missing_key, not_text, open_reader

_NUM_EXAMPLES = 3


@dataclass
class Counts:
    """What a corpus gave, and what it left out and why."""

    documents: int = 0
    empty: int = 0
    repaired: int = 0
    """Documents with a lone surrogate, which no encoding knows: replaced by U+FFFD. They are kept."""
    skipped_files: int = 0
    """Files of directories that aren't UTF-8 text, or links to nothing."""
    skipped_examples: list[str] = field(default_factory=list[str])
    where: int = 0
    """Rows that a condition left out."""
    too_short: int = 0
    too_long: int = 0
    excluded_files: int = 0

    def skip(self, path: str) -> None:
        """Count a file that isn't text."""
        self.skipped_files += 1
        if len(self.skipped_examples) < _NUM_EXAMPLES:
            self.skipped_examples.append(path)


@dataclass(frozen=True)
class Position:
    """A place between two documents, for another process to go on from."""

    source: int
    row: int
    """Rows of that source that were read."""
    bytes_done: int
    counts: Counts

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> Position:
        """Return what ``to_dict`` came from. Raises KeyError or TypeError."""
        return Position(raw["source"], raw["row"], raw["bytes_done"], Counts(**raw["counts"]))


class Corpus:
    """Iterate the texts of ``inputs``, once. Counts what it leaves out.

    Raises DataError at once for missing or unreadable inputs (all of them), symbolic links that form a loop and
    options that no input has a use for; while iterating for damaged files; and from ``require_documents`` when nothing
    was found.
    """

    def __init__(
        self,
        inputs: Sequence[str | os.PathLike[str]],
        *,
        text_key: str = "text",
        split: str = "train",
        filters: Filters | None = None,
        patterns: Patterns | None = None,
        separator: str | None = None,
    ) -> None:
        self.filters = filters or Filters()
        self._text_key, self._split, self._separator = text_key, split, separator
        self._inputs = [os.fspath(item) for item in inputs]
        self.listing = find_sources(self._inputs, patterns or Patterns(), split)
        self.counts = Counts(excluded_files=self.listing.excluded_files)
        for path in self.listing.broken_links:
            self.counts.skip(path)
        self.bytes_done = 0
        """Bytes of input that the documents so far came from."""
        self._source = self._row = 0
        self._check_options()

    @property
    def total_bytes(self) -> int | None:
        """Bytes of all input files; None if a `datasets` id is among them."""
        return self.listing.total_bytes

    def position(self) -> Position:
        """Return the place behind the last document that was taken."""
        return Position(self._source, self._row, self.bytes_done, copy.deepcopy(self.counts))

    def start_at(self, position: Position) -> None:
        """Let the iteration begin behind the last document before ``position``, of a corpus with the same listing."""
        self._source, self._row, self.bytes_done = position.source, position.row, position.bytes_done
        self.counts = copy.deepcopy(position.counts)

    def __iter__(self) -> Iterator[str]:
        first, skip = self._source, self._row
        before = sum(source.size for source in self.listing.sources[:first])
        for number, source in enumerate(self.listing.sources[first:], first):
            self._source = number
            yield from self._documents(source, skip, before)
            skip = 0
            before += source.size
            self.bytes_done = before
        self._source, self._row = len(self.listing.sources), 0

    def require_documents(self) -> None:
        """Raise DataError if the iteration found no text."""
        counts = self.counts
        if counts.documents:
            return
        found = f"{counts.empty} empty documents, {counts.skipped_files} files that aren't text"
        dropped = counts.where + counts.too_short + counts.too_long
        if dropped:
            found += f", {dropped} left out by --where, --min-characters and --max-characters"
        raise refused(", ".join(self._inputs), f"holds no text ({found})")

    def _check_options(self) -> None:
        kinds = {source.kind for source in self.listing.sources}
        problems: list[Problem] = []
        if self.filters.where and kinds == {Kind.text}:
            keys = ", ".join(where.key for where in self.filters.where)
            problems.append(Problem("where", keys, "chooses rows by their keys, and no input has rows"))
        if self._separator is not None and Kind.text not in kinds:
            problems.append(Problem("separator", self._separator, "cuts text files, and no input is one"))
        if self._separator == "":
            problems.append(Problem("separator", "", "must not be empty"))
        if problems:
            raise DataError(problems, title="input")

    def _documents(self, source: Source, skip: int, before: int) -> Iterator[str]:
        columns = Columns(self._text_key, tuple(dict.fromkeys(where.column for where in self.filters.where)))
        reader = open_reader(source, columns, separator=self._separator, split=self._split)
        try:
            yield from self._taken(reader, skip, before)
        except NotTextError as error:
            if source.named:
                raise refused(
                    source.path, f"isn't UTF-8 text: {error}", "convert it to UTF-8 or leave it out"
                ) from None
            self.counts.skip(source.path)
        except READ_ERRORS as error:
            raise refused(source.path, f"can't be read: {error}") from None

    def _taken(self, reader: Reader, skip: int, before: int) -> Iterator[str]:
        """Yield the texts of one source that the filters let through."""
        counts, plain = self.counts, reader.plain
        accepts = self.filters.row_test() if reader.source.has_rows else None
        shortest, longest = self.filters.min_characters or 0, self.filters.max_characters
        for row, value in enumerate(reader.rows(skip), skip):
            if plain:
                text = value
            else:
                if value is None:
                    continue
                if accepts is not None and isinstance(value, dict) and not accepts(value):
                    counts.where += 1
                    continue
                text = self._text_of(value, reader, row)
            if not text or text.isspace():
                counts.empty += 1
            elif len(text) < shortest:
                counts.too_short += 1
            elif longest is not None and len(text) > longest:
                counts.too_long += 1
            else:
                counts.documents += 1
                self._row = row + 1
                self.bytes_done = before + reader.bytes_done
                yield text

    def _text_of(self, value: Any, reader: Reader, row: int) -> str:
        key = self._text_key
        if not isinstance(value, dict):
            rule = f"is a {type(value).__name__}, expected an object with the key `{key}`"
            raise refused(reader.place(row), rule)
        if key not in value:
            raise missing_key(reader.place(row), key, list(value))
        text = value[key]
        if not isinstance(text, str):
            raise not_text(reader.place(row), key, text)
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                self.counts.repaired += 1
                return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text
