"""Which files a corpus consists of, in one fixed order, and what they are."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from trainer.core.errors import DataError, Problem
from trainer.core.hub import DatasetName, cached_snapshots, hub_answers

_JSONL = re.compile(r"\.(jsonl|ndjson)(\.gz|\.zst)?$", re.IGNORECASE)


class Kind(StrEnum):
    """How a source is read."""

    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"
    arrow = "arrow"
    dataset = "dataset"


@dataclass(frozen=True)
class Source:
    """One file, or one id of the Hub."""

    kind: Kind
    path: str
    """Path, or ``owner/name[@revision][:configuration]``."""
    named: bool = True
    """Given by the user, not found in a directory."""
    size: int = 0
    modified_ns: int = 0
    revision: str | None = None
    """Commit of a data set of the Hub."""
    snapshot: str | None = None
    """Directory of the cache that holds it, where the Hub doesn't answer."""

    @property
    def has_rows(self) -> bool:
        """Whether its documents are rows with keys, not whole files."""
        return self.kind != Kind.text


@dataclass(frozen=True)
class Patterns:
    """Which files of directories are taken: shell patterns for a name, or with a slash for the path below."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def take(self, relative: str) -> bool:
        """Return whether a file belongs to the corpus; a directory that is excluded excludes what is in it."""
        parts = relative.split("/")
        if self.include and not any(fnmatchcase(relative if "/" in p else parts[-1], p) for p in self.include):
            return False
        return not any(
            fnmatchcase(relative, p) if "/" in p else any(fnmatchcase(part, p) for part in parts) for p in self.exclude
        )


@dataclass(frozen=True)
class Listing:
    """The sources of a corpus and what was left out while looking for them."""

    sources: tuple[Source, ...]
    broken_links: tuple[str, ...]
    excluded_files: int

    @property
    def total_bytes(self) -> int | None:
        """Bytes of all files; None if a data set of the Hub is among them."""
        if any(source.kind == Kind.dataset for source in self.sources):
            return None
        return sum(source.size for source in self.sources)

    def facts(self) -> list[list[Any]]:
        """Return what tells this corpus from another without reading it."""
        return [
            [os.path.abspath(s.path) if s.kind != Kind.dataset else s.path, s.kind, s.size, s.modified_ns, s.revision]
            for s in self.sources
        ]


def find_sources(inputs: Sequence[str], patterns: Patterns, split: str) -> Listing:
    """Return the sources of ``inputs``. Raises DataError for all that are missing, unreadable, or links in a loop."""
    finder = _Finder(patterns, split)
    problems = [] if inputs else [Problem("input", None, "names nothing to read")]
    sources: list[Source] = []
    for item in inputs:
        try:
            sources += finder.find(item)
        except DataError as error:
            problems += error.problems
    if (patterns.include or patterns.exclude) and not problems and not finder.directories:
        problems.append(Problem("include, exclude", None, "choose files of directories, and no input is one"))
    if problems:
        raise DataError(problems, title="input")
    return Listing(tuple(sources), tuple(finder.broken_links), finder.excluded_files)


class _Finder:
    def __init__(self, patterns: Patterns, split: str) -> None:
        self._patterns, self._split = patterns, split
        self.broken_links: list[str] = []
        self.excluded_files = 0
        self.directories = 0

    def find(self, item: str) -> list[Source]:
        path = Path(item)
        if path.is_dir():
            saved = _saved_dataset(path, self._split)
            if saved is not None:
                return [_source(file, named=True) for file in saved]
            self.directories += 1
            found = [_source(file, named=False) for file in self._walk(path, path, ())]
            if not found:
                rule = (
                    "holds no files" if not self.excluded_files else "holds no files that --include and --exclude take"
                )
                raise refused(path, rule)
            return found
        if path.is_file():
            if not os.access(path, os.R_OK):
                raise refused(path, "can't be read: permission denied")
            return [_source(path, named=True)]
        if path.exists():
            raise refused(path, "must be a regular file or a directory")
        name = DatasetName.parse(item)
        looks_like_file = Path(name.identifier if name else item).suffix or (
            len(path.parts) > 1 and path.parent.exists()
        )
        if name is not None and not looks_like_file and not path.is_symlink():
            return [_hub_source(item, name)]
        raise refused(path, "doesn't exist")

    def _walk(self, root: Path, directory: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
        status = directory.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            raise refused(directory, "is a symbolic link to a directory above it: a loop", "remove the link")
        if above and (saved := _saved_dataset(directory, self._split)) is not None:
            yield from saved
            return
        try:
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as error:
            raise refused(directory, f"can't be read: {error.strerror}") from None
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__pycache__":
                continue
            path = Path(entry.path)
            if entry.is_dir():
                yield from self._walk(root, path, (*above, identity))
            elif not self._patterns.take(path.relative_to(root).as_posix()):
                self.excluded_files += 1
            elif entry.is_file():
                yield path
            else:
                self.broken_links.append(str(path))


def _source(path: Path, named: bool) -> Source:
    status = path.stat()
    suffix = path.suffix.lower()
    kind = Kind.jsonl if _JSONL.search(path.name) else {".parquet": Kind.parquet, ".arrow": Kind.arrow}.get(suffix)
    return Source(kind or Kind.text, str(path), named, status.st_size, status.st_mtime_ns)


def _hub_source(item: str, name: DatasetName) -> Source:
    if not hub_answers(name.identifier, "dataset"):
        return _fetched_source(item, name)
    from huggingface_hub import HfApi

    try:
        revision = HfApi().dataset_info(name.identifier, revision=name.revision).sha
    except Exception:  # noqa: BLE001 (no such data set, or no right to see it: loading it says which)
        revision = name.revision
    return Source(Kind.dataset, item, revision=revision)


def _fetched_source(item: str, name: DatasetName) -> Source:
    """Return the source of what `trainer fetch --dataset` brought."""
    found = cached_snapshots(name.identifier)
    if not found:
        rule = "doesn't exist, and the Hugging Face Hub can't be reached to look for a data set"
        raise refused(item, rule, f"trainer fetch RECIPE --dataset {item} where there is internet brings one")
    commit = name.revision or (next(iter(found)) if len(found) == 1 else "")
    if commit not in found:
        rule = "the Hugging Face Hub can't be reached, and its cache has other commits of this data set"
        raise refused(item, rule, f"write one of {', '.join(f'{name.identifier}@{known}' for known in found)}")
    return Source(Kind.dataset, item, revision=commit, snapshot=str(found[commit]))


def _saved_dataset(directory: Path, split: str) -> list[Path] | None:
    """Return the files of a directory that ``datasets`` saved (``save_to_disk``), None if it isn't one."""
    splits = directory / "dataset_dict.json"
    if splits.is_file():
        names = [str(name) for name in _read_json(splits).get("splits") or []]
        if split not in names:
            raise refused(directory, f"has no split {split!r}; it has {', '.join(names)}", "choose one with --split")
        directory = directory / split
    state = directory / "state.json"
    if not state.is_file() or not (directory / "dataset_info.json").is_file():
        return None
    listed: Any = _read_json(state).get("_data_files")
    if not isinstance(listed, list):
        return None
    files = [directory / str(entry.get("filename")) for entry in listed if isinstance(entry, dict)]
    for file in files:
        if not file.is_file():
            raise refused(file, "is part of a saved data set and doesn't exist", "copy the data set again")
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise refused(path, f"can't be read: {error}") from None
    return value if isinstance(value, dict) else {}


def refused(place: object, rule: str, fix: str = "") -> DataError:
    """Return the error that names a place of the input."""
    return DataError(Problem(str(place), None, rule, fix), title="input")
