"""Which files a source of a recipe names. Standard library only: ``trainer check`` asks too.

A source is a prefix (PREFIX.bin + PREFIX.idx), the prefix of a shard set (PREFIX.json names its members), a datatrove
file (X.ds), a directory (every prefix and .ds file below it) or a pattern (data/code-*). Several files are read end to
end: members of a set in its own order, everything else sorted by name.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.core.errors import DataError, Problem
from trainer.data.shard_manifest import SetManifest, is_set_manifest, parse_set_manifest

# Enough to tell a set's manifest from a side-car, whose checksums may take megabytes.
_HEAD_BYTES = 256


@dataclass(frozen=True)
class Member:
    """One pair of Megatron files (``path`` is their prefix) or one datatrove file (``path`` ends in .ds)."""

    path: str
    kind: Literal["megatron", "datatrove"]


@dataclass(frozen=True)
class Located:
    """The members of a source, in the order they are read."""

    members: tuple[Member, ...]
    manifest: SetManifest | None = None
    """Of a shard set: what is known of the members without opening them."""


def locate(path: str) -> Located:
    """Return the members of a source.

    Raises DataError if there are none, for a set's manifest that can't be used, for links that form a loop, and if two
    members are the same file.
    """
    if any(character in path for character in "*?[") and not os.path.exists(path + ".idx"):
        return _several(path, sorted(_prefix_of(found) for found in glob.glob(path) if _is_shard(found)))
    if os.path.isdir(path):
        return _several(path, sorted(_walk(Path(path), ())))
    if path.endswith(".ds"):
        return Located((Member(path, "datatrove"),))
    manifest = read_manifest(Path(path + ".json"))
    if manifest is None:
        return Located((Member(path, "megatron"),))
    folder = os.path.dirname(path)
    return Located(tuple(Member(os.path.join(folder, m.name), "megatron") for m in manifest.members), manifest)


def read_manifest(path: Path) -> SetManifest | None:
    """Return the manifest of a shard set, or None if ``path`` doesn't exist or isn't one. Raises DataError."""
    try:
        with open(path, "rb") as file:
            if b'"trainer-shard-set"' not in file.read(_HEAD_BYTES):
                return None
            file.seek(0)
            value: Any = json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        fix = "restore it, or tokenize the text again"
        raise DataError(Problem(str(path), None, f"can't be read: {error}", fix), title="token shards") from None
    return parse_set_manifest(path, value) if is_set_manifest(value) else None


def _several(path: str, prefixes: list[str]) -> Located:
    """Return members found by a search, each once."""
    if not prefixes:
        rule = "holds no token shards (PREFIX.idx with PREFIX.bin, or .ds)"
        raise _refused(path, rule, "correct it, or write shards with `trainer data tokenize`")
    seen: dict[str, str] = {}
    for prefix in dict.fromkeys(prefixes):
        real = os.path.realpath(prefix if prefix.endswith(".ds") else prefix + ".bin")
        if real in seen:
            raise _refused(path, f"names the same shard twice: {seen[real]} and {prefix}", "remove the link")
        seen[real] = prefix
    return Located(tuple(Member(p, "datatrove" if p.endswith(".ds") else "megatron") for p in seen.values()))


def _walk(directory: Path, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    status = directory.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise _refused(str(directory), "is a symbolic link to a directory above it: a loop", "remove the link")
    try:
        entries = list(os.scandir(directory))
    except OSError as error:
        raise _refused(str(directory), f"can't be read: {error.strerror}") from None
    for entry in entries:
        if entry.is_dir():
            yield from _walk(Path(entry.path), (*above, identity))
        elif _is_shard(entry.path):
            yield _prefix_of(entry.path)


def _is_shard(name: str) -> bool:
    return name.endswith((".idx", ".bin", ".ds"))


def _prefix_of(name: str) -> str:
    return name if name.endswith(".ds") else name[:-4]


def _refused(path: str, rule: str, fix: str = "") -> DataError:
    return DataError(Problem(path, None, rule, fix), title="token shards")
