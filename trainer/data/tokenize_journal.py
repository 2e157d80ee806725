"""PREFIX.progress.json: how far tokenizing is, so that the same command goes on after a kill.

It names sizes of ``*.partial`` files that were synced before, and the place in the corpus they came from. What decides
the bytes of the output (options, inputs with sizes and times, tokenizer, versions) is hashed into ``key``: with another
key there is nothing to go on from. ``phase`` is ``encode``, or ``publish`` once the files are complete and only wait
for their names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.core.durable import fsync_directory, write_durably
from trainer.core.errors import DataError, Problem
from trainer.data.shard_set_writer import Finished, Written
from trainer.data.shard_sidecar import fingerprint_of

_FORMAT = "trainer-tokenize-progress"
_VERSION = 1


@dataclass(frozen=True)
class Record:
    """The contents of a journal."""

    phase: Literal["encode", "publish"]
    position: dict[str, Any]
    """Of the corpus (phase encode)."""
    sides: list[dict[str, Any]]
    """One an output: state of writer and report (encode), or what waits for its name (publish)."""


class Journal:
    """Reads, replaces and removes PREFIX.progress.json."""

    def __init__(self, output: str, key: Mapping[str, list[Any]]) -> None:
        self.path = Path(output + ".progress.json")
        self._temporary = Path(output + ".progress.json.partial")
        self._key = {name: fingerprint_of(facts) for name, facts in key.items()}

    def exists(self) -> bool:
        """Return whether an earlier run, or this one, left a journal."""
        return self.path.exists()

    def read(self) -> tuple[Record | None, str]:
        """Return the record to go on from, or None and why there is none ("" if there is no journal)."""
        try:
            raw: dict[str, Any] = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return None, ""
        except (OSError, ValueError) as error:
            return None, f"its record can't be read ({error})"
        try:
            if (raw["format"], raw["version"]) != (_FORMAT, _VERSION):
                return None, "its record is of another version"
            changed = [name for name, value in self._key.items() if raw["key"].get(name) != value]
            if changed:
                return None, f"{' and '.join(changed)} changed"
            return Record(raw["phase"], raw["position"], raw["sides"]), ""
        except (KeyError, TypeError, AttributeError):
            return None, "its record is damaged"

    def write(self, record: Record) -> None:
        """Replace the journal, atomically and durably. Raises DataError if the disk fails."""
        value = {"format": _FORMAT, "version": _VERSION, "key": self._key, **asdict(record)}
        try:
            # One name for whoever writes: a kill leaves nothing that the next start doesn't replace.
            write_durably(self._temporary, json.dumps(value))
            self._temporary.replace(self.path)
            fsync_directory(self.path.parent)
        except OSError as error:
            problem = Problem(str(self.path), None, f"can't be written: {error.strerror}")
            raise DataError(problem, title="tokenize") from error

    def remove(self) -> None:
        """Forget it. Harmless if there is none."""
        self.path.unlink(missing_ok=True)
        self._temporary.unlink(missing_ok=True)


def finished_from(raw: dict[str, Any]) -> Finished:
    """Return what ``asdict`` made JSON of. Raises KeyError or TypeError."""
    members: Sequence[str] | None = raw["members"]
    return Finished(
        str(raw["prefix"]),
        None if members is None else tuple(members),
        tuple(raw["replaced"]),
        Written(**raw["written"]),
    )
