"""Read one source of a corpus as a stream of rows: JSON Lines, Parquet, Arrow, `datasets`, or the texts of a file."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from trainer.core.errors import DataError
from trainer.core.hub import DatasetName
from trainer.data.corpus_files import Kind, Source, refused

# Rows of a table that are Python objects at a time.
_BATCH_ROWS = 256
_BUFFER_BYTES = 1 << 20
# What ends an Arrow stream; without it a file that was cut between two batches looks complete.
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


class NotTextError(Exception):
    """A file isn't UTF-8 text."""


@dataclass(frozen=True)
class Columns:
    """Which values of a row are wanted."""

    text: str
    others: tuple[str, ...] = ()
    """Keys that filters look at; a row may lack them."""


class Reader(ABC):
    """The rows of one source. ``bytes_done``: bytes of the file behind the rows so far."""

    plain = False
    """Rows are texts; otherwise they are objects that should hold one."""

    def __init__(self, source: Source, columns: Columns) -> None:
        self.source, self.columns = source, columns
        self.bytes_done = 0

    @abstractmethod
    def rows(self, skip: int) -> Iterator[Any]:
        """Yield the rows from number ``skip`` on; None where there is nothing, such as an empty line.

        Raises DataError for what can't be read, OSError and EOFError for what can't be read from disk.
        """

    def place(self, row: int) -> str:
        """Return what to call row ``row``, counted from 0."""
        return f"{self.source.path} row {row}"


def open_reader(source: Source, columns: Columns, *, separator: str | None, split: str) -> Reader:
    """Return the reader of a source."""
    if source.kind == Kind.text:
        return _Texts(source, columns, separator)
    if source.kind == Kind.jsonl:
        return _JsonLines(source, columns)
    if source.kind == Kind.parquet:
        return _Parquet(source, columns)
    if source.kind == Kind.arrow:
        return _Arrow(source, columns)
    return _Hub(source, columns, split)


class _Texts(Reader):
    plain = True

    def __init__(self, source: Source, columns: Columns, separator: str | None) -> None:
        super().__init__(source, columns)
        self._separator = separator

    def rows(self, skip: int) -> Iterator[str]:
        with _opened(Path(self.source.path)) as (file, _):
            data = file.read()
        if b"\0" in data:
            raise NotTextError("it holds zero bytes")
        try:
            # Bytes, not text mode: line ends stay as they are.
            text = data.decode("utf-8-sig")
        except ValueError as error:
            raise NotTextError(str(error)) from None
        texts = text.split(self._separator) if self._separator else [text]
        if len(texts) > 1 and not texts[-1]:
            texts.pop()  # the separator ended the last one
        yield from texts[skip:]
        self.bytes_done = self.source.size

    def place(self, row: int) -> str:
        return self.source.path


class _JsonLines(Reader):
    def rows(self, skip: int) -> Iterator[Any]:
        loads = json.loads
        with _opened(Path(self.source.path)) as (lines, raw):
            for number, line in enumerate(lines):
                if number < skip:
                    continue
                self.bytes_done = raw.tell()
                if line.isspace():
                    yield None
                    continue
                try:
                    value = loads(line)
                except (ValueError, RecursionError) as error:
                    raise refused(self.place(number), f"isn't JSON: {error}") from None
                yield value

    def place(self, row: int) -> str:
        return f"{self.source.path}:{row + 1}"


class _Tables(Reader):
    """Rows of Arrow tables. They are texts where no filter needs more than that."""

    def __init__(self, source: Source, columns: Columns) -> None:
        super().__init__(source, columns)
        self.plain = not columns.others

    def _check_names(self, names: Sequence[str]) -> None:
        if self.columns.text not in names:
            raise missing_key(self.source.path, self.columns.text, names)

    def _wanted(self, names: Sequence[str]) -> list[str]:
        return [name for name in (self.columns.text, *self.columns.others) if name in names]

    def _values(self, table: Any, first_row: int) -> Iterator[Any]:
        """Yield the rows of a pyarrow Table or RecordBatch."""
        names = table.schema.names
        self._check_names(names)
        for start in range(0, table.num_rows, _BATCH_ROWS):
            part = table.slice(start, _BATCH_ROWS)
            if not self.plain:
                yield from part.select(self._wanted(names)).to_pylist()
                continue
            texts = part.column(names.index(self.columns.text)).to_pylist()
            for offset, text in enumerate(texts):
                if not isinstance(text, str):
                    raise not_text(self.place(first_row + start + offset), self.columns.text, text)
            yield from texts

    def _from(self, tables: Iterable[Any], skip: int, first_row: int = 0) -> Iterator[Any]:
        """Yield the rows of ``tables`` from number ``skip`` on."""
        row = first_row
        for table in tables:
            left_out = min(max(0, skip - row), table.num_rows)
            if left_out < table.num_rows:
                yield from self._values(table.slice(left_out), row + left_out)
            row += table.num_rows


class _Parquet(_Tables):
    def rows(self, skip: int) -> Iterator[Any]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.source.path) as file:
                names, num_rows = file.schema_arrow.names, max(1, file.metadata.num_rows)
                self._check_names(names)
                group, first_row = 0, 0
                while group < file.num_row_groups and first_row + file.metadata.row_group(group).num_rows <= skip:
                    first_row += file.metadata.row_group(group).num_rows
                    group += 1

                def batches() -> Iterator[Any]:
                    row = first_row
                    groups, wanted = range(group, file.num_row_groups), self._wanted(names)
                    for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups, columns=wanted):
                        row += batch.num_rows
                        self.bytes_done = self.source.size * row // num_rows
                        yield batch

                yield from self._from(batches(), skip, first_row)
        except pyarrow.ArrowException as error:
            raise refused(self.source.path, f"isn't a readable Parquet file: {error}") from None


class _Arrow(_Tables):
    def rows(self, skip: int) -> Iterator[Any]:
        import pyarrow

        try:
            with pyarrow.memory_map(self.source.path) as file:
                yield from self._from(self._batches(file), skip)
        except pyarrow.ArrowException as error:
            raise refused(self.source.path, f"isn't a readable Arrow file: {error}") from None

    def _batches(self, file: Any) -> Iterator[Any]:
        import pyarrow.ipc

        size = self.source.size
        if file.read(6) == b"ARROW1":  # the file format; what `datasets` writes is the stream format
            reader = pyarrow.ipc.open_file(file)
            for number in range(reader.num_record_batches):
                self.bytes_done = size * (number + 1) // reader.num_record_batches
                yield reader.get_batch(number)
            return
        file.seek(max(0, size - 8))
        if not file.read().endswith(_END_OF_STREAM):
            raise refused(self.source.path, "has no end: it is cut off, or no Arrow file", "copy it again")
        file.seek(0)
        for batch in pyarrow.ipc.open_stream(file):
            self.bytes_done = file.tell()
            yield batch


class _Hub(_Tables):
    def __init__(self, source: Source, columns: Columns, split: str) -> None:
        super().__init__(source, columns)
        self._split = split

    def rows(self, skip: int) -> Iterator[Any]:
        import datasets

        name, snapshot = DatasetName.parse(self.source.path), self.source.snapshot
        assert name is not None, self.source.path
        try:
            dataset = datasets.load_dataset(
                snapshot or name.identifier,
                name.configuration,
                split=self._split,
                streaming=True,
                revision=None if snapshot else self.source.revision,
            )
        except Exception as error:  # noqa: BLE001 (a library's many ways to say: no such data set)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            rule = f"is neither a file nor a `datasets` id that loads: {reason}"
            raise refused(self.source.path, rule) from None
        yield from self.stream(dataset, skip)

    def stream(self, dataset: Any, skip: int) -> Iterator[Any]:
        """Yield the rows of a ``datasets.IterableDataset``."""
        yield from self._from(dataset.with_format("arrow").iter(batch_size=_BATCH_ROWS), skip)


@contextmanager
def _opened(path: Path) -> Generator[tuple[IO[bytes], IO[bytes]], None, None]:
    """Yield the decompressed file, and the file on disk, whose position says how far it is."""
    suffix = path.suffix.lower()
    with open(path, "rb") as raw:
        if suffix == ".gz":
            with gzip.open(raw) as file:
                yield cast("IO[bytes]", file), raw
        elif suffix == ".zst":
            import pyarrow

            if path.stat().st_size == 0:  # no frame at all: it decompresses to nothing
                raise EOFError("it is empty, which no compressed file is")
            # pyarrow's codec reads frame after frame, and says so when the last one is cut.
            stream: Any = pyarrow.CompressedInputStream(cast("Any", raw), "zstd")
            with io.BufferedReader(stream, _BUFFER_BYTES) as file:
                yield cast("IO[bytes]", file), raw
        else:
            yield raw, raw


READ_ERRORS = (OSError, EOFError, zlib.error)


def missing_key(place: object, key: str, names: Sequence[object]) -> DataError:
    """Return the error for a row or table without ``key``."""
    listed = ", ".join(map(str, names)) or "nothing"
    return refused(place, f"has no `{key}`; it has {listed}", "choose one with --text-key")


def not_text(place: str, key: str, value: Any) -> DataError:
    """Return the error for a value that isn't text."""
    fix = f"leave such rows out with --where {key}!=null" if value is None else ""
    return refused(place, f"`{key}` is {type(value).__name__}, expected text", fix)
