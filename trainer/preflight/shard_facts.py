"""What the header and side-car of token shards say, read without NumPy and without touching the tokens."""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from trainer.core.errors import DataError
from trainer.data.shard_manifest import SetManifest
from trainer.data.shard_paths import Member, locate

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# Megatron's dtype codes; 6 and 7 are floats, which are no tokens.
DTYPES = {1: ("uint8", 1), 2: ("int8", 1), 3: ("int16", 2), 4: ("int32", 4), 5: ("int64", 8), 8: ("uint16", 2)}
BYTES_PER_SEQUENCE = 4 + 8  # int32 length, int64 offset


@dataclass(frozen=True)
class ShardFacts:
    """One source: PREFIX.bin + PREFIX.idx (+ PREFIX.json), a shard set, a directory, a pattern or a .ds file."""

    path: str
    defects: tuple[tuple[str, str], ...] = ()
    """(rule, fix) of everything that makes the shards unreadable."""
    num_tokens: int | None = None
    dtype: str | None = None
    sidecar: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Content of PREFIX.json; empty for shards made by other tools."""
    files: frozenset[tuple[int, int]] = frozenset()
    """Device and inode of each file of tokens: two paths, one file."""

    @property
    def vocab_size(self) -> int | None:
        """Size of the vocabulary the tokens come from."""
        value = self.sidecar.get("vocab_size")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @property
    def tokenizer_hash(self) -> str | None:
        """Hash of the tokenizer that made the shards."""
        tokenizer = self.sidecar.get("tokenizer")
        value = cast("Mapping[str, Any]", tokenizer).get("hash") if isinstance(tokenizer, Mapping) else None
        return value if isinstance(value, str) else None


def read_source(path: str) -> ShardFacts:
    """Return what can be read of the source ``path`` names; never raises, defects are facts."""
    try:
        located = locate(path)
    except DataError as error:
        return ShardFacts(path, tuple((f"{problem.key}: {problem.rule}", problem.fix) for problem in error.problems))
    if located.manifest is not None:
        return _read_set(path, located.members, located.manifest)
    parts = [_read_datatrove(m.path) if m.kind == "datatrove" else _read_pair(m.path) for m in located.members]
    if len(parts) == 1:
        return replace(parts[0], path=path)
    counts = [part.num_tokens for part in parts if part.num_tokens is not None]
    known = next((part for part in parts if part.sidecar), parts[0])
    total = sum(counts) if len(counts) == len(parts) else None
    # A side-car's own counts describe one shard, not the source.
    stated = {name: value for name, value in known.sidecar.items() if name in ("vocab_size", "tokenizer")}
    defects = tuple(defect for part in parts for defect in part.defects)
    files = frozenset[tuple[int, int]]().union(*(part.files for part in parts))
    return ShardFacts(path, defects, total, known.dtype, stated, files)


def _read_set(path: str, members: tuple[Member, ...], manifest: SetManifest) -> ShardFacts:
    defects: list[tuple[str, str]] = []
    files: set[tuple[int, int]] = set()
    for member, stated in zip(members, manifest.members, strict=True):
        item = next((size for name, size in DTYPES.values() if name == stated.dtype), 1)
        wanted = {".bin": stated.num_tokens * item, ".idx": HEADER.size + 20 * stated.num_documents + 8}
        for suffix, size in wanted.items():
            try:
                status = os.stat(member.path + suffix)
            except OSError as error:
                reason = (
                    "does not exist" if isinstance(error, FileNotFoundError) else f"can't be read: {error.strerror}"
                )
                defects.append((f"{member.path}{suffix} {reason}", "restore it from a copy"))
                continue
            if suffix == ".bin":
                files.add((status.st_dev, status.st_ino))
            if status.st_size != size:
                rule = f"{member.path}{suffix} has {status.st_size} bytes where the set's manifest states {size}"
                defects.append((rule, "restore it from a copy"))
    tokenizer = {"name": manifest.tokenizer_name, "hash": manifest.tokenizer_hash}
    total = sum(member.num_tokens for member in manifest.members)
    facts = {"vocab_size": manifest.vocab_size, "tokenizer": tokenizer}
    return ShardFacts(path, tuple(defects), total, manifest.members[0].dtype, facts, frozenset(files))


def _read_datatrove(path: str) -> ShardFacts:
    again = "copy X.ds, X.ds.index and X.ds.metadata again"
    try:
        status = os.stat(path)
        size = status.st_size
        with open(path + ".index", "rb") as file:
            file.seek(-8, os.SEEK_END)
            num_tokens = int.from_bytes(file.read(8), "little")
    except OSError as error:
        reason = error.strerror if error.filename else "its index is empty"
        return ShardFacts(path, ((f"{error.filename or path} can't be read: {reason}", again),))
    if num_tokens == 0 or size not in (2 * num_tokens, 4 * num_tokens):
        rule = f"{path} has {size} bytes where its index ends at token {num_tokens}"
        return ShardFacts(path, ((rule, again),))
    dtype = "uint16" if size == 2 * num_tokens else "uint32"
    return ShardFacts(path, (), num_tokens, dtype, files=frozenset({(status.st_dev, status.st_ino)}))


def _read_pair(path: str) -> ShardFacts:
    sizes: dict[str, int] = {}
    identity: set[tuple[int, int]] = set()
    defects: list[tuple[str, str]] = []
    for suffix in (".bin", ".idx"):
        try:
            status = os.stat(path + suffix)
        except FileNotFoundError:
            fix = "write them with `trainer data tokenize --output PREFIX`, or correct the prefix"
            if path.endswith((".bin", ".idx")):
                fix = f"give the prefix without the ending: {path[:-4]}"
            defects.append((f"{path}{suffix} does not exist", fix))
            continue
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            defects.append((f"{path}{suffix} can't be read: {reason}", "check the path and its rights"))
            continue
        sizes[suffix] = status.st_size
        if suffix == ".bin":
            identity.add((status.st_dev, status.st_ino))
        if not stat.S_ISREG(status.st_mode):
            defects.append((f"{path}{suffix} is not a file", "give the prefix of token shards"))
        elif not os.access(path + suffix, os.R_OK):
            defects.append((f"{path}{suffix} can't be read: permission denied", "check its rights"))
    if defects:
        return ShardFacts(path, tuple(defects))
    dtype, num_tokens, defects = _read_index(path, sizes)
    sidecar, more = _read_sidecar(path, Path(path + ".json"))
    return ShardFacts(path, tuple(defects + more), num_tokens, dtype, sidecar, frozenset(identity))


def _read_index(path: str, sizes: Mapping[str, int]) -> tuple[str | None, int | None, list[tuple[str, str]]]:
    """Return dtype, tokens and defects; what costs no look at more than the header and the last sequence."""
    again = "tokenize the corpus again"
    try:
        with open(path + ".idx", "rb") as file:
            header = file.read(HEADER.size)
            rule = _header_defect(header, sizes[".idx"])
            if rule is not None:
                return None, None, [(f"{path}.idx {rule}", again)]
            _, _, code, sequences, _ = HEADER.unpack(header)
            dtype, item = DTYPES[code]
            end = _end_of_last_sequence(file, sequences, item)
    except (OSError, struct.error) as error:
        return None, None, [(f"{path}.idx can't be read: {error}", "check its rights")]
    if sizes[".bin"] % item:
        return dtype, None, [(f"{path}.bin has {sizes['.bin']} bytes, no multiple of {item} ({dtype})", again)]
    if end != sizes[".bin"]:
        rule = f"{path}.bin has {sizes['.bin']} bytes where its index ends at byte {end}"
        return dtype, None, [(rule, f"{again}, or copy both files again")]
    return dtype, sizes[".bin"] // item, []


def _header_defect(header: bytes, size: int) -> str | None:
    """Return what is wrong with the first 34 bytes of an index of ``size`` bytes, None if nothing is."""
    if header.startswith(b"TNTIDX"):
        return "is the older TNTIDX format"
    if not header.startswith(MAGIC):
        return "is no MMIDIDX index (wrong magic)"
    if len(header) < HEADER.size:
        return "is cut off in its header"
    _, version, code, sequences, documents = HEADER.unpack(header)
    if version == 1 << 56:
        return "is big-endian, expected little-endian numbers"
    if version != 1:
        return f"has version {version}, not 1"
    if code not in DTYPES:
        return f"has token dtype code {code}, which is no whole number"
    wanted = HEADER.size + sequences * BYTES_PER_SEQUENCE + documents * 8
    if size < wanted:
        return f"has {size} bytes where its header asks for {wanted}"
    return None if sequences else "is empty: it lists no documents"


def _end_of_last_sequence(file: BinaryIO, sequences: int, item: int) -> int:
    """Return the byte of ``.bin`` behind the last sequence."""
    file.seek(HEADER.size + 4 * (sequences - 1))
    (length,) = struct.unpack("<i", file.read(4))
    file.seek(HEADER.size + 12 * sequences - 8)
    (start,) = struct.unpack("<q", file.read(8))
    return start + length * item


def _read_sidecar(path: str, sidecar: Path) -> tuple[Mapping[str, Any], list[tuple[str, str]]]:
    try:
        value = json.loads(sidecar.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, []  # Megatron and GPT-NeoX write none
    except (OSError, ValueError, RecursionError) as error:
        return {}, [(f"{path}.json can't be read: {error}", "tokenize the corpus again")]
    if not isinstance(value, dict):
        return {}, [(f"{path}.json is no JSON object", "tokenize the corpus again")]
    return cast("dict[str, Any]", value), []
