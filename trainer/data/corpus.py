"""Documents of a corpus, in one fixed order: text files, JSON Lines, Parquet, directories, `datasets` ids.

- ``.jsonl`` / ``.ndjson``, also ``.gz`` and ``.zst``: a line is an object, its ``text_key`` a document;
- ``.parquet``: a row is a document;
- a directory: everything below it, sorted by name; hidden entries and ``__pycache__`` are left out;
- any other file is one document of UTF-8 text. One that isn't text is refused when it was named, and skipped and
  counted when it was found in a directory;
- what doesn't exist and looks like an id (``name``, ``owner/name``, ``owner/name:configuration``) is loaded by
  ``datasets``.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import os
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

from trainer.core.errors import DataError, Problem
from trainer.core.hub import hub_answers

_JSONL = re.compile(r"\.(jsonl|ndjson)(\.gz|\.zst)?$", re.IGNORECASE)
_DATASET_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?$")


@dataclass(frozen=True)
class Document:
    """One text and where it comes from."""

    text: str
    place: str
    """File, and line or row, for messages."""


@dataclass(frozen=True)
class _Found:
    path: Path
    named: bool
    """Given by the user, not found in a directory."""


class Corpus:
    """Iterate the documents of ``inputs``. Counts what it skips.

    Raises DataError at once for missing or unreadable inputs (all of them) and symbolic links that form a loop, while
    iterating for damaged files, and from ``require_documents`` when nothing was found.
    """

    def __init__(
        self, inputs: Sequence[str | os.PathLike[str]], *, text_key: str = "text", split: str = "train"
    ) -> None:
        self.text_key, self.split = text_key, split
        self.num_documents = 0
        self.empty_documents = 0
        self.repaired_documents = 0
        """Documents with a lone surrogate, which no encoding knows: replaced by U+FFFD."""
        self.skipped_files: list[str] = []
        """Files of directories that aren't UTF-8 text, or links to nothing."""
        self.bytes_done = 0
        """Bytes of input that the documents so far came from."""
        self._inputs = [os.fspath(item) for item in inputs]
        self._found: list[_Found | str] = []
        problems: list[Problem] = []
        if not self._inputs:
            problems.append(Problem("input", None, "names nothing to read"))
        for item in self._inputs:
            try:
                self._found += self._find(item)
            except DataError as error:
                problems += error.problems
        if problems:
            raise DataError(problems, title="input")

    @cached_property
    def total_bytes(self) -> int | None:
        """Bytes of all input files; None if a `datasets` id is among them."""
        if any(isinstance(item, str) for item in self._found):
            return None
        return sum(item.path.stat().st_size for item in self._found if not isinstance(item, str))

    def __iter__(self) -> Iterator[Document]:
        before = 0
        for item in self._found:
            documents = self._read_dataset(item) if isinstance(item, str) else self._read_file(item, before)
            for document in documents:
                if not document.text or document.text.isspace():
                    self.empty_documents += 1
                    continue
                self.num_documents += 1
                yield document
            if not isinstance(item, str):
                before += item.path.stat().st_size
                self.bytes_done = before

    def require_documents(self) -> None:
        """Raise DataError if the iteration found no text."""
        if self.num_documents:
            return
        skipped = f" ({self.empty_documents} empty documents, {len(self.skipped_files)} files that aren't text)"
        raise DataError(Problem("input", ", ".join(self._inputs), f"holds no text{skipped}"), title="input")

    def _find(self, item: str) -> list[_Found | str]:
        path = Path(item)
        if path.is_dir():
            found = [_Found(file, named=False) for file in self._walk(path, ())]
            if not found:
                raise _refused(path, "holds no files")
            return list(found)
        if path.is_file():
            if not os.access(path, os.R_OK):
                raise _refused(path, "can't be read: permission denied")
            return [_Found(path, named=True)]
        if path.exists():
            raise _refused(path, "must be a regular file or a directory")
        is_id = _DATASET_ID.match(item) and not path.suffix and not (len(path.parts) > 1 and path.parent.exists())
        if is_id and not path.is_symlink():
            return [item]
        raise _refused(path, "doesn't exist")

    def _walk(self, directory: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
        status = directory.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            raise _refused(directory, "is a symbolic link to a directory above it: a loop", "remove the link")
        try:
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as error:
            raise _refused(directory, f"can't be read: {error.strerror}") from None
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__pycache__":
                continue
            path = Path(entry.path)
            if entry.is_dir():
                yield from self._walk(path, (*above, identity))
            elif entry.is_file():
                yield path
            else:
                self.skipped_files.append(str(path))

    def _read_file(self, found: _Found, before: int) -> Iterator[Document]:
        path = found.path
        try:
            if _JSONL.search(path.name):
                yield from self._read_jsonl(path, before)
            elif path.suffix.lower() == ".parquet":
                yield from self._read_parquet(path, before)
            else:
                yield from self._read_text(found)
        except (OSError, EOFError) as error:
            raise _refused(path, f"can't be read: {error}") from None

    def _read_text(self, found: _Found) -> Iterator[Document]:
        data = found.path.read_bytes()
        try:
            if b"\0" in data:
                raise ValueError("it holds zero bytes")
            # Bytes, not text mode: line ends stay as they are.
            text = data.decode("utf-8-sig")
        except ValueError as error:
            if found.named:
                raise _refused(
                    found.path, f"isn't UTF-8 text: {error}", "convert it to UTF-8 or leave it out"
                ) from None
            self.skipped_files.append(str(found.path))
            return
        yield Document(text, str(found.path))

    def _read_jsonl(self, path: Path, before: int) -> Iterator[Document]:
        with open(path, "rb") as raw, _decompressed(raw, path) as lines:
            for number, line in enumerate(lines, 1):
                self.bytes_done = before + raw.tell()
                if line.isspace():
                    continue
                place = f"{path}:{number}"
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise _refused(place, f"isn't JSON: {error}") from None
                yield Document(self._text_of(value, place), place)

    def _read_parquet(self, path: Path, before: int) -> Iterator[Document]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                names, rows = file.schema_arrow.names, file.metadata.num_rows
                if self.text_key not in names:
                    raise _missing_key(path, self.text_key, names)
                row, size = 0, path.stat().st_size
                for batch in file.iter_batches(batch_size=256, columns=[self.text_key]):
                    for text in batch.column(0).to_pylist():
                        place = f"{path} row {row}"
                        yield Document(self._text_of({self.text_key: text}, place), place)
                        row += 1
                    self.bytes_done = before + size * row // max(rows, 1)
        except pyarrow.ArrowException as error:
            raise _refused(path, f"isn't a readable Parquet file: {error}") from None

    def _read_dataset(self, name: str) -> Iterator[Document]:
        identifier, _, configuration = name.partition(":")
        if not hub_answers(identifier, "dataset"):
            raise _refused(name, "doesn't exist, and the Hugging Face Hub can't be reached to look for a data set")
        import datasets

        try:
            rows = datasets.load_dataset(identifier, configuration or None, split=self.split, streaming=True)
        except Exception as error:  # noqa: BLE001 (a library's many ways to say: no such data set)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise _refused(name, f"is neither a file nor a `datasets` id that loads: {reason}") from None
        for number, row in enumerate(rows):
            yield Document(self._text_of(row, f"{name} row {number}"), f"{name} row {number}")

    def _text_of(self, value: Any, place: str) -> str:
        if not isinstance(value, dict):
            raise _refused(place, f"is a {type(value).__name__}, expected an object with the key `{self.text_key}`")
        if self.text_key not in value:
            raise _missing_key(place, self.text_key, list(value))
        text = value[self.text_key]
        if not isinstance(text, str):
            raise _refused(place, f"`{self.text_key}` is {type(text).__name__}, expected text")
        try:
            text.encode()
        except UnicodeEncodeError:
            self.repaired_documents += 1
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text


@contextmanager
def _decompressed(raw: IO[bytes], path: Path) -> Generator[IO[bytes], None, None]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        with gzip.open(raw) as file:
            yield cast("IO[bytes]", file)
    elif suffix == ".zst":
        try:
            zstandard: Any = importlib.import_module("zstandard")  # optional
        except ImportError:
            raise _refused(path, "needs the package zstandard", "pip install zstandard") from None
        try:
            with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as file:
                yield cast("IO[bytes]", io.BufferedReader(file, 1 << 20))
        except zstandard.ZstdError as error:
            raise _refused(path, f"can't be read: {error}") from None
    else:
        yield raw


def _missing_key(place: object, key: str, names: list[str]) -> DataError:
    return _refused(
        place, f"has no `{key}`; it has {', '.join(map(str, names)) or 'nothing'}", "choose one with --text-key"
    )


def _refused(place: object, rule: str, fix: str = "") -> DataError:
    return DataError(Problem(str(place), None, rule, fix), title="input")
