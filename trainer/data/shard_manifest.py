"""PREFIX.json of a set of shards: PREFIX-00000, PREFIX-00001, … read as one source, in this order.

One small file says what opening thousands of shards needs to know, so that none of them is touched before it is read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from trainer.core.durable import replace_text
from trainer.core.errors import DataError, Problem
from trainer.data.shard_sidecar import fingerprint_of

FORMAT = "trainer-shard-set"
VERSION = 1


@dataclass(frozen=True)
class SetMember:
    """One set of shard files and what its own side-car says of it."""

    name: str
    """File name of its prefix, in the folder of the set: never a path."""
    num_tokens: int
    num_documents: int
    dtype: str
    fingerprint: str


@dataclass(frozen=True)
class SetManifest:
    """The contents of PREFIX.json of a shard set."""

    members: tuple[SetMember, ...]
    vocab_size: int | None
    end_of_document_id: int | None
    tokenizer_name: str | None
    tokenizer_hash: str | None
    tool_version: str
    report: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def fingerprint(self) -> str:
        """Hash of the content of all members, in order, whatever they are called."""
        return fingerprint_of([FORMAT, [member.fingerprint for member in self.members]])

    def to_json(self) -> str:
        """Return the text of the file."""
        value = {
            "format": FORMAT,
            "version": VERSION,
            "num_tokens": sum(member.num_tokens for member in self.members),
            "num_documents": sum(member.num_documents for member in self.members),
            "vocab_size": self.vocab_size,
            "end_of_document_id": self.end_of_document_id,
            "tokenizer": {"name": self.tokenizer_name, "hash": self.tokenizer_hash},
            "fingerprint": self.fingerprint,
            "tool_version": self.tool_version,
            "report": self.report,
            "shards": [vars(member) for member in self.members],
        }
        return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def member_name(prefix: str, index: int) -> str:
    """Return the file name of shard ``index`` of the set ``prefix``: ``code-00007``."""
    return f"{Path(prefix).name}-{index:05d}"


def write_set_manifest(prefix: str, manifest: SetManifest) -> Path:
    """Write PREFIX.json, atomically and durably; every member must be complete. Return its path."""
    path = Path(prefix + ".json")
    replace_text(path, manifest.to_json())
    return path


def is_set_manifest(value: object) -> bool:
    """Return whether a parsed PREFIX.json describes a set, not one pair of files."""
    return isinstance(value, dict) and cast("dict[str, Any]", value).get("format") == FORMAT


def parse_set_manifest(path: Path, raw: dict[str, Any]) -> SetManifest:
    """Return the manifest in ``raw``, the parsed JSON of ``path``.

    Raises DataError for an unknown version, a missing or wrong field, a name that leaves the folder, a name given
    twice, no shards at all, or a fingerprint that doesn't follow from the contents.
    """

    def refuse(value: object, rule: str) -> DataError:
        fix = "restore it, or tokenize the text again"
        return DataError(Problem(str(path), value, rule, fix), title="token shards")

    if raw.get("version") != VERSION:
        raise refuse(raw.get("version"), f"has an unknown version, expected {VERSION}")
    try:
        tokenizer: dict[str, Any] = raw.get("tokenizer") or {}
        members = tuple(
            SetMember(
                name=str(member["name"]),
                num_tokens=_count(member, "num_tokens"),
                num_documents=_count(member, "num_documents"),
                dtype=str(member["dtype"]),
                fingerprint=str(member["fingerprint"]),
            )
            for member in raw["shards"]
        )
        manifest = SetManifest(
            members=members,
            vocab_size=None if raw.get("vocab_size") is None else _count(raw, "vocab_size"),
            end_of_document_id=raw.get("end_of_document_id"),
            tokenizer_name=tokenizer.get("name"),
            tokenizer_hash=tokenizer.get("hash"),
            tool_version=str(raw.get("tool_version", "")),
            report=dict(raw.get("report") or {}),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise refuse(None, f"lacks a field or has one of the wrong type: {error}") from None
    names = [member.name for member in members]
    if not names:
        raise refuse([], "names no shards")
    if len(set(names)) != len(names):
        raise refuse(next(name for name in names if names.count(name) > 1), "names a shard twice")
    if wrong := [name for name in names if Path(name).name != name or name in ("", ".", "..")]:
        raise refuse(wrong[0], "names a shard outside its own folder")
    if manifest.fingerprint != raw.get("fingerprint"):
        raise refuse(raw.get("fingerprint"), "its fingerprint doesn't follow from its contents: it was edited")
    return manifest


def _count(raw: dict[str, Any], key: str) -> int:
    value = raw[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} = {value!r}")
    return value
