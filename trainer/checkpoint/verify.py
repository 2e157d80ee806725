"""Check the contents of a checkpoint against its manifest."""

from __future__ import annotations

from pathlib import Path

from trainer.checkpoint import layout
from trainer.checkpoint.manifest_rules import uncovered, unsound
from trainer.checkpoint.shard_file import hash_file


def damaged_files(directory: Path, part: int = 0, parts: int = 1) -> list[str]:
    """Return what is wrong with every ``parts``-th file from ``part``: missing, of another size, changed contents."""
    problems = layout.find_problems(directory)
    manifest = layout.read_manifest(directory)
    if problems or manifest is None:
        return problems
    if part == 0 and manifest.get("version") in layout.VERSIONS:
        problem = unsound(manifest) or uncovered(manifest)
        if problem is not None:
            return [f"{layout.MANIFEST_NAME}: {problem}"]
    for name, facts in sorted(manifest["files"].items())[part::parts]:
        listed = layout.file_parts(facts) or []
        try:
            found = hash_file(directory / name, [num_bytes for num_bytes, _ in listed])
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
            continue
        for digest, (_, expected) in zip(found, listed, strict=True):
            if digest != expected:
                problems.append(f"{name}: contents changed (xxh3_64 {digest}, the manifest says {expected})")
    return problems
