"""Find all that is wrong with a checkpoint: files, contents, headers and whether every element is there once."""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.checkpoint import layout, random_state
from trainer.checkpoint.coverage import coverage_problems
from trainer.checkpoint.manifest_rules import unsound
from trainer.checkpoint.sections import prefix_of
from trainer.checkpoint.shard_file import hash_file
from trainer.checkpoint.shard_reader import ShardReader
from trainer.checkpoint.survey import every_step_directory, is_newer
from trainer.checkpoint.writer import slice_key
from trainer.core.errors import CheckpointError

Kind = Literal["manifest", "missing", "size", "contents", "header", "coverage", "untrue", "foreign", "newer"]
_HARMLESS = ("foreign", "newer")
Known = Mapping[str, str]
"""By hash, of which checkpoint's file a file may be: "rank-00001.safetensors of step 50"."""


@dataclass(frozen=True)
class Finding:
    """One thing wrong."""

    kind: Kind
    text: str

    @property
    def damage(self) -> bool:
        """Whether the checkpoint can't be used because of it: a stray file and a newer format harm nothing."""
        return self.kind not in _HARMLESS


def examine(directory: Path, known: Known | None = None) -> list[Finding]:
    """Read every file of a checkpoint and return what is wrong, nothing if it is sound.

    ``known`` lets shards of other checkpoints be told from changed ones.
    """
    if directory.is_symlink() or not directory.is_dir():
        return [Finding("manifest", "is not a directory")]
    manifest = layout.read_manifest(directory)
    if manifest is None:
        return [Finding("manifest", _manifest_problem(directory))]
    if is_newer(manifest):
        rule = f"has format version {manifest['version']}, this trainer reads up to {layout.VERSION}: upgrade it"
        return [Finding("newer", rule), *_foreign(directory, manifest, known or {})]
    if manifest.get("version") not in layout.VERSIONS:
        return [Finding("manifest", f"{layout.MANIFEST_NAME}: no format version is {manifest.get('version')!r}")]
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        return [Finding("manifest", f"{layout.MANIFEST_NAME} lists no files")]
    found: list[Finding] = []
    sound: set[str] = set()
    for name in files:
        problems = _file_problems(directory, name, files[name], manifest, known or {})
        found += problems
        if not problems:
            sound.add(name)
    covered = [Finding("coverage", text) for text in coverage_problems(manifest)]
    if not covered and not any(finding.kind == "manifest" for finding in found):
        if (untrue := unsound(manifest)) is not None:
            return [*found, Finding("untrue", f"{layout.MANIFEST_NAME}: {untrue}")]
        found += [Finding("header", text) for text in _header_problems(directory, manifest, sound)]
    return found + covered + _foreign(directory, manifest, known or {})


def damage(directory: Path) -> list[str]:
    """Return what makes a checkpoint useless, in sentences."""
    return [finding.text for finding in examine(directory) if finding.damage or finding.kind == "newer"]


def known_files(run_directory: Path) -> dict[str, str]:
    """Return by hash what the manifests of a run list. Raises nothing: what can't be read lists nothing."""
    known: dict[str, str] = {}
    for step, directory in every_step_directory(run_directory):
        manifest = layout.read_manifest(directory) or {}
        files = manifest.get("files")
        for name, facts in files.items() if isinstance(files, dict) else ():
            parts = layout.file_parts(facts)
            if parts is not None and len(parts) == 1:
                known.setdefault(parts[0][1], f"{name} of step {step}")
    return known


def _manifest_problem(directory: Path) -> str:
    """Return why a directory has no manifest."""
    name = layout.MANIFEST_NAME
    path = layout.manifest_path(directory)
    lost = "its shards can't be told apart without it"
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return f"{name}: not a regular file"
        content = path.read_bytes()
    except OSError as error:
        return f"{name}: {error.strerror}: {lost}"
    if not content:
        return f"{name}: empty: {lost}"
    try:
        manifest: object = json.loads(content)
    except (ValueError, RecursionError):
        return f"{name}: {len(content):,} bytes that are no JSON (cut off or garbled): {lost}"
    step = manifest.get("step") if isinstance(manifest, dict) else None
    if isinstance(manifest, dict) and manifest.get("format") == layout.FORMAT and type(step) is int:
        if step == layout.parse_step_name(directory.name):
            return f"{name}: changed (the hash that it holds of itself is another): {lost}"
        return f"{name}: is that of step {step}"
    return f"{name}: is no manifest of this trainer"


def _file_problems(
    directory: Path, name: str, facts: object, manifest: Mapping[str, Any], known: Known
) -> list[Finding]:
    parts = layout.file_parts(facts)
    if not layout.is_file_name(name):
        return [Finding("manifest", f"{layout.MANIFEST_NAME} lists {name!r}, which is no plain file name")]
    if parts is None:
        return [Finding("manifest", f"{name}: no sizes and hashes in the manifest")]
    size = sum(num_bytes for num_bytes, _ in parts)
    try:
        held = (directory / name).lstat()
        if not stat.S_ISREG(held.st_mode):
            return [Finding("size", f"{name}: not a regular file")]
        if held.st_size != size:
            what = "empty" if not held.st_size else "cut off" if held.st_size < size else "too long"
            other = known.get(hash_file(directory / name)[0]) if held.st_size else None
            what = f"is {other}" if other else what
            return [Finding("size", f"{name}: {what}: {held.st_size:,} bytes, the manifest says {size:,}")]
        hashes = hash_file(directory / name, [num_bytes for num_bytes, _ in parts])
    except FileNotFoundError:
        return [Finding("missing", f"{name}: missing")]
    except OSError as error:
        return [Finding("missing", f"{name}: {error.strerror}")]
    ranks = [rank for rank, shard in enumerate(manifest.get("shards") or ()) if shard == name]
    found: list[Finding] = []
    for number, (digest, (_, expected)) in enumerate(zip(hashes, parts, strict=True)):
        if digest == expected:
            continue
        where = f"rank {ranks[number]}'s part of it" if len(parts) == len(ranks) > 1 else "contents"
        if digest in known:
            found.append(Finding("contents", f"{name}: is {known[digest]}"))
        else:
            rule = f"{name}: {where} changed (xxh3_64 {digest}, not {expected})"
            found.append(Finding("contents", rule))
    return found


def _foreign(directory: Path, manifest: Mapping[str, Any], known: Known) -> list[Finding]:
    """Return files that don't belong to the checkpoint."""
    files = manifest.get("files")
    listed = {layout.MANIFEST_NAME, *(files if isinstance(files, dict) else ())}
    found: list[Finding] = []
    for path in sorted(directory.iterdir()):
        if path.name in listed:
            continue
        origin = ""
        if path.is_file() and not path.is_symlink():
            other = known.get(hash_file(path)[0])
            origin = f": it is {other}" if other else ""
        found.append(Finding("foreign", f"{path.name}: the manifest does not list it{origin}"))
    return found


def _header_problems(directory: Path, manifest: Mapping[str, Any], sound: set[str]) -> Iterator[str]:
    """Yield where shards hold other tensors than the manifest says; only files that are as they were written."""
    shards: list[str] = manifest["shards"]
    shared = {name for name, times in Counter(shards).items() if times > 1}
    expected: dict[str, dict[str, tuple[str, int]]] = {name: {} for name in shards}
    for name, entry in manifest["tensors"].items():
        for key, state in entry["states"].items():
            for shard, _, count, *_ in state["slices"]:
                file = shards[shard]
                prefix = prefix_of(shard) if file in shared else ""
                expected[file][prefix + slice_key(name, key)] = str(state["dtype"]), count
    with_generators: set[bool] = set()
    for file, tensors in expected.items():
        if file not in manifest["files"]:
            yield f"{layout.MANIFEST_NAME} names the shard {file}, which it does not list"
        if file not in sound:
            continue
        try:
            held = ShardReader(directory / file).places()
        except (CheckpointError, OSError) as error:
            yield f"{file}: {str(error).removeprefix(f'{directory / file}: ')}"
            continue
        generators = {key for key in held if key.split("/")[-1].startswith(random_state.PREFIX)}
        with_generators.add(bool(generators))
        for key in tensors.keys() - held.keys():
            yield f"{file}: lacks {key}"
        for key in held.keys() - tensors.keys() - generators:
            if not key.endswith("padding"):
                yield f"{file}: holds {key}, which the manifest does not list"
        for key in tensors.keys() & held.keys():
            if held[key] != tensors[key]:
                yield f"{file}: {key} is {_shown(held[key])}, the manifest says {_shown(tensors[key])}"
    if len(with_generators) > 1:
        yield "some shards hold the state of random generators, others don't"


def _shown(place: tuple[str, int]) -> str:
    return f"{place[1]:,} x {place[0]}"
