"""What the header and side-car of token shards say, read without NumPy and without touching the tokens."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# Megatron's dtype codes; 6 and 7 are floats, which are no tokens.
DTYPES = {1: ("uint8", 1), 2: ("int8", 1), 3: ("int16", 2), 4: ("int32", 4), 5: ("int64", 8), 8: ("uint16", 2)}
BYTES_PER_SEQUENCE = 4 + 8  # int32 length, int64 offset


@dataclass(frozen=True)
class ShardFacts:
    """One PREFIX.bin + PREFIX.idx (+ PREFIX.json)."""

    path: str
    defects: tuple[tuple[str, str], ...] = ()
    """(rule, fix) of everything that makes the shards unreadable."""
    num_tokens: int | None = None
    dtype: str | None = None
    sidecar: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Content of PREFIX.json; empty for shards made by other tools."""

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


def read_shard(path: str) -> ShardFacts:
    """Return what can be read of the shards at ``path``; never raises, defects are facts."""
    prefix = path
    sizes: dict[str, int] = {}
    defects: list[tuple[str, str]] = []
    for suffix in (".bin", ".idx"):
        try:
            file = Path(prefix + suffix)
            sizes[suffix] = file.stat().st_size
            if not file.is_file():
                defects.append((f"{path}{suffix} is not a file", "give the prefix of token shards"))
        except FileNotFoundError:
            fix = "write them with `trainer data tokenize --output PREFIX`, or correct the prefix"
            if path.endswith((".bin", ".idx")):
                fix = f"give the prefix without the ending: {path[:-4]}"
            defects.append((f"{path}{suffix} does not exist", fix))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            defects.append((f"{path}{suffix} can't be read: {reason}", "check the path and its rights"))
    if defects:
        return ShardFacts(path, tuple(defects))
    dtype, num_tokens, defects = _read_index(path, Path(prefix + ".idx"), sizes)
    sidecar, more = _read_sidecar(path, Path(prefix + ".json"))
    return ShardFacts(path, tuple(defects + more), num_tokens, dtype, sidecar)


def _read_index(
    path: str, index: Path, sizes: Mapping[str, int]
) -> tuple[str | None, int | None, list[tuple[str, str]]]:
    again = "tokenize the corpus again"
    try:
        with index.open("rb") as file:
            header = file.read(HEADER.size)
    except OSError as error:
        return None, None, [(f"{path}.idx can't be read: {error.strerror}", "check its rights")]
    if header.startswith(b"TNTIDX"):
        return None, None, [(f"{path}.idx is the older TNTIDX format", again)]
    if not header.startswith(MAGIC):
        return None, None, [(f"{path}.idx is no MMIDIDX index (wrong magic)", again)]
    if len(header) < HEADER.size:
        return None, None, [(f"{path}.idx is cut off in its header", again)]
    _, version, code, sequences, documents = HEADER.unpack(header)
    if version != 1:
        return None, None, [(f"{path}.idx has version {version}, not 1", again)]
    if code not in DTYPES:
        return None, None, [(f"{path}.idx has token dtype code {code}, which is no whole number", again)]
    dtype, item = DTYPES[code]
    wanted = HEADER.size + sequences * BYTES_PER_SEQUENCE + documents * 8
    if sizes[".idx"] < wanted:
        return dtype, None, [(f"{path}.idx has {sizes['.idx']} bytes where its header asks for {wanted}", again)]
    if sizes[".bin"] % item:
        return dtype, None, [(f"{path}.bin has {sizes['.bin']} bytes, no multiple of {item} ({dtype})", again)]
    return dtype, sizes[".bin"] // item, []


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
