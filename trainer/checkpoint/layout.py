"""Where checkpoints lie and which of them exist: a checkpoint exists when its manifest does.

RUN/checkpoints/step-00000050/manifest.json + the files it lists; ``latest`` names the newest. What is read here may
have been cut short by a crash or changed by somebody, so nothing in it is trusted: names are plain file names, files
are regular files in the directory itself.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import xxhash

from trainer.checkpoint.manifest_rules import unsound_facts
from trainer.core.errors import Problem, RefusedError

FORMAT = "trainer-checkpoint"
VERSION = 3
VERSION_WITH_CUTS = 2
"""What is written where each rank has a file of its own: older trainers read it."""
VERSION_WITHOUT_CUTS = 1
"""What is written where moreover no tensor is divided along a dim."""
VERSIONS = (VERSION_WITHOUT_CUTS, VERSION_WITH_CUTS, VERSION)
MANIFEST_NAME = "manifest.json"
POINTER_NAME = "latest"
MANIFEST_BYTES = 2**29
"""No more is read. A manifest of 1024 ranks and 1000 tensors has about a tenth of it."""

_STEP_NAME = re.compile(r"step-([0-9]{8,18})")
_TEMPORARY_NAME = re.compile(r"\.step-([0-9]{8,18})\.tmp-.+")
_REPLACED = "-replaced"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_DIGEST = re.compile(r"[0-9a-f]{16}")
_OWN_HASH = "manifest_xxh3_64"
_OWN_HASH_AT_END = re.compile(rb',"manifest_xxh3_64":"([0-9a-f]{16})"\}\s*\Z')
_POINTER_BYTES = 4096


def checkpoints_directory(run_directory: Path) -> Path:
    """Return RUN/checkpoints."""
    return run_directory / "checkpoints"


def step_name(step: int) -> str:
    """Return the directory name of a step: step-00000050."""
    return f"step-{step:08d}"


def parse_step_name(name: str) -> int | None:
    """Return the step of a directory name, None if it is not exactly one that :func:`step_name` makes."""
    match = _STEP_NAME.fullmatch(name)
    step = int(match.group(1)) if match else None
    return step if step is not None and step_name(step) == name else None


def step_directory(run_directory: Path, step: int) -> Path:
    """Return where the checkpoint of ``step`` is committed to."""
    return checkpoints_directory(run_directory) / step_name(step)


def temporary_directory(run_directory: Path, step: int, attempt: str) -> Path:
    """Return where the checkpoint of ``step`` is written before it is committed: .step-00000050.tmp-<attempt>."""
    return checkpoints_directory(run_directory) / f".{step_name(step)}.tmp-{attempt}"


def replaced_directory(temporary: Path) -> Path:
    """Return where the checkpoint waits that is replaced by the one in ``temporary``, between two renames."""
    return temporary.with_name(temporary.name + _REPLACED)


def parse_replaced_name(name: str) -> int | None:
    """Return the step of a name that :func:`replaced_directory` makes, None if it is none."""
    match = _TEMPORARY_NAME.fullmatch(name) if name.endswith(_REPLACED) else None
    return int(match.group(1)) if match else None


def temporary_directories(run_directory: Path) -> list[Path]:
    """Return what interrupted writers left behind."""
    return [path for path in _entries(run_directory) if _TEMPORARY_NAME.fullmatch(path.name)]


def pointer_path(run_directory: Path) -> Path:
    """Return RUN/checkpoints/latest."""
    return checkpoints_directory(run_directory) / POINTER_NAME


def manifest_path(directory: Path) -> Path:
    """Return the manifest of a checkpoint directory."""
    return directory / MANIFEST_NAME


def manifest_text(fields: dict[str, Any]) -> str:
    """Return what a manifest of these fields holds: JSON whose last field is a hash of all that stands before it."""
    text = json.dumps({name: value for name, value in fields.items() if name != _OWN_HASH}, separators=(",", ":"))
    return f'{text[:-1]},"{_OWN_HASH}":"{xxhash.xxh3_64_hexdigest(text[:-1].encode())}"}}'


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the manifest of ``directory``, None if it is missing, damaged, not ours or of another step.

    The version is left to the reader: a checkpoint of a newer version exists, and must be refused aloud.
    """
    try:
        content = _manifest_bytes(manifest_path(directory))
        manifest: object = json.loads(content)
    except (OSError, ValueError, RecursionError):
        return None
    own = _OWN_HASH_AT_END.search(content)  # manifests of older trainers, and edited ones, have none there
    if not isinstance(manifest, dict) or (own and xxhash.xxh3_64_hexdigest(content[: own.start()]) != own[1].decode()):
        return None
    fields = cast("dict[str, Any]", manifest)
    fields.pop(_OWN_HASH, None)
    step: object = fields.get("step")
    if fields.get("format") != FORMAT or type(step) is not int or step != parse_step_name(directory.name):
        return None
    return fields


def _manifest_bytes(path: Path) -> bytes:
    """Return what is in a manifest. Raises OSError unless it is a regular file of at most MANIFEST_BYTES."""
    # O_NONBLOCK: a FIFO of that name must not make us wait.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if found.st_size > MANIFEST_BYTES:
            raise OSError(errno.EFBIG, f"larger than {MANIFEST_BYTES} bytes")
        return file.read(MANIFEST_BYTES)


def file_facts(parts: Sequence[tuple[int, str]]) -> dict[str, Any]:
    """Return what a manifest says of a file that consists of ``parts``, each (bytes, xxh3_64)."""
    if len(parts) == 1:
        return {"bytes": parts[0][0], "xxh3_64": parts[0][1]}
    return {"bytes": sum(num_bytes for num_bytes, _ in parts), "parts": [list(part) for part in parts]}


def file_parts(facts: object) -> list[tuple[int, str]] | None:
    """Return (bytes, xxh3_64) of the consecutive parts of a file, None if ``facts`` are none."""
    if not isinstance(facts, dict):
        return None
    fields = cast("dict[str, object]", facts)
    listed: object = fields.get("parts", [[fields.get("bytes"), fields.get("xxh3_64")]])
    if not isinstance(listed, list) or not listed:
        return None
    parts: list[tuple[int, str]] = []
    for part in cast("list[object]", listed):
        match part:
            case [int(num_bytes), str(digest)] if _is_size(num_bytes) and _DIGEST.fullmatch(digest):
                parts.append((num_bytes, digest))
            case _:
                return None
    return parts if sum(num_bytes for num_bytes, _ in parts) == fields.get("bytes") else None


def is_file_name(name: object) -> bool:
    """Return whether a manifest may list ``name``: a plain file name that isn't the manifest's own."""
    return isinstance(name, str) and _FILE_NAME.fullmatch(name) is not None and name != MANIFEST_NAME


def find_problems(directory: Path) -> list[str]:
    """Return what keeps ``directory`` from being a complete checkpoint; contents are not hashed here."""
    if directory.is_symlink() or not directory.is_dir():
        return ["not a directory"]
    manifest = read_manifest(directory)
    if manifest is None:
        try:
            _manifest_bytes(manifest_path(directory))
        except OSError as error:
            return [f"{MANIFEST_NAME} is missing or unreadable ({error.strerror})"]
        return [f"{MANIFEST_NAME} is missing, damaged or of another step"]
    files: object = manifest.get("files")
    if not isinstance(files, dict) or not files:
        return [f"{MANIFEST_NAME} lists no files"]
    if (unsound := unsound_facts(manifest)) is not None:
        return [f"{MANIFEST_NAME}: {unsound}"]
    listed = cast("dict[object, object]", files)
    return [problem for name, facts in listed.items() if (problem := _file_problem(directory, name, facts))]


def is_complete(directory: Path) -> bool:
    """Return whether the manifest is sound and every file it lists is there with the size it states."""
    return not find_problems(directory)


def step_directories(run_directory: Path) -> list[tuple[int, Path]]:
    """Return (step, directory) of every committed checkpoint, oldest first. Links are no checkpoints."""
    found: list[tuple[int, Path]] = []
    for path in _entries(run_directory):
        step = parse_step_name(path.name)
        if step is not None and not path.is_symlink() and read_manifest(path) is not None:
            found.append((step, path))
    return sorted(found)


def steps_with_manifest(run_directory: Path) -> list[int]:
    """Return the steps of all checkpoints, oldest first, without reading manifests, which may be large."""
    steps = [(parse_step_name(path.name), path) for path in _entries(run_directory)]
    return sorted(step for step, path in steps if step is not None and manifest_path(path).is_file())


def newest(run_directory: Path) -> tuple[int, Path] | None:
    """Return (step, directory) of the newest complete checkpoint, None if there is none."""
    for step, path in reversed(step_directories(run_directory)):
        if is_complete(path):
            return step, path
    return None


def read_pointer(run_directory: Path) -> tuple[int, Path] | None:
    """Return (step, directory) that ``latest`` names, or :func:`newest` where it names no complete checkpoint.

    A kill between commit and pointer leaves ``latest`` one checkpoint behind; a resume should ask :func:`newest`.
    """
    _refuse_way_out(run_directory)
    try:
        with pointer_path(run_directory).open("rb") as file:
            name = file.read(_POINTER_BYTES).decode("ascii").strip()
    except (OSError, ValueError):
        return newest(run_directory)
    step = parse_step_name(name)
    if step is not None:
        directory = step_directory(run_directory, step)
        if is_complete(directory):
            return step, directory
    return newest(run_directory)


def _entries(run_directory: Path) -> list[Path]:
    """Return what is in RUN/checkpoints. Raises RefusedError if that leads out of the run."""
    _refuse_way_out(run_directory)
    try:
        return sorted(checkpoints_directory(run_directory).iterdir())
    except OSError:
        return []


def _refuse_way_out(run_directory: Path) -> None:
    """Raise RefusedError if RUN/checkpoints is a link that leads out of the run."""
    directory = checkpoints_directory(run_directory)
    try:
        leads_out = directory.is_symlink() and not directory.resolve().is_relative_to(run_directory.resolve())
    except (OSError, RuntimeError):  # it leads to itself
        leads_out = True
    if leads_out:
        rule, fix = "is a link out of the run", "move them into the run, or name one with room for them"
        raise RefusedError(Problem("checkpoints", str(directory), rule, fix))


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _file_problem(directory: Path, name: object, facts: object) -> str | None:
    if not is_file_name(name):
        return f"{name!r} is no plain file name"
    parts = file_parts(facts)
    if parts is None:
        return f"{name}: no sizes and hashes in the manifest"
    size = sum(num_bytes for num_bytes, _ in parts)
    try:
        found = (directory / str(name)).lstat()
    except OSError as error:
        return f"{name}: {error.strerror}"
    if not stat.S_ISREG(found.st_mode):
        return f"{name}: not a regular file"
    if found.st_size != size:
        return f"{name}: {found.st_size} bytes, the manifest says {size}"
    return None
