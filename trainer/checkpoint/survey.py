"""What lies in a run's directory of checkpoints, whole or not: facts for people, from manifests and sizes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from trainer.checkpoint import layout
from trainer.core.errors import Problem, RefusedError

DAMAGED_NAME = "damaged"
"""RUN/checkpoints/damaged: what `trainer checkpoint repair` moved aside."""
_POINTER_LEFTOVER = re.compile(rf"\.{layout.POINTER_NAME}\.tmp-.+")


@dataclass(frozen=True, kw_only=True)
class Held:
    """One directory of a step, as its manifest tells it; None where it doesn't."""

    step: int
    directory: Path
    num_bytes: int
    """Of the files that are there."""
    world_size: int | None
    topology: Mapping[str, int] | None
    dtype: str | None
    """What the run computed in."""
    created_unix: float | None
    milestone: bool
    """Whether its run never deletes it: a multiple of checkpoint.keep_every_steps."""
    best: bool
    """Whether it is kept as the one of the best evaluation (checkpoint.keep_best)."""
    newer: bool
    """Whether a newer trainer wrote it, in a format that this one can't read."""
    problems: tuple[str, ...]
    """What keeps it from being complete; contents are not read."""

    @property
    def complete(self) -> bool:
        """Whether all files are there in their sizes and this trainer can read them."""
        return not self.problems and not self.newer


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A run's checkpoints, oldest first, and what else is there."""

    run_directory: Path
    checkpoints: tuple[Held, ...]
    pointed: int | None
    """The step that ``latest`` names, whether or not it is there."""
    pointer_problem: str | None
    interrupted: tuple[Path, ...]
    """What interrupted saves and deletions left."""
    damaged: tuple[Path, ...]
    """What an earlier repair moved aside."""


def survey(run_directory: Path) -> Survey:
    """Look at RUN/checkpoints. Raises RefusedError where the run has none."""
    # The pointer first, and all again if it was moved: a job that trains there adds checkpoints and deletes others.
    pointed, problem = _read_pointer(run_directory)
    found = _all_held(run_directory)
    if pointed is not None and all(held.step != pointed for held in found):
        pointed, problem = _read_pointer(run_directory)
        found = _all_held(run_directory)
    interrupted = (*layout.temporary_directories(run_directory), *_pointer_leftovers(run_directory))
    if not found and not interrupted:
        rule, fix = "holds no checkpoint", "give the run.directory of a recipe"
        raise RefusedError(Problem("RUN_DIR", str(run_directory), rule, fix))
    if pointed is not None:
        problem = _pointer_problem(pointed, {held.step: held for held in found})
    try:
        damaged = tuple(sorted((layout.checkpoints_directory(run_directory) / DAMAGED_NAME).iterdir()))
    except OSError:
        damaged = ()
    return Survey(
        run_directory=run_directory,
        checkpoints=found,
        pointed=pointed,
        pointer_problem=problem,
        interrupted=interrupted,
        damaged=damaged,
    )


def every_step_directory(run_directory: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of all that is called like a checkpoint, oldest first, with a manifest or without."""
    try:
        paths = list(layout.checkpoints_directory(run_directory).iterdir())
    except OSError:
        return []
    named = [(layout.parse_step_name(path.name), path) for path in paths]
    return sorted((step, path) for step, path in named if step is not None)


def held_steps(run_directory: Path) -> str:
    """Return the steps that are there, for a message."""
    return ", ".join(str(step) for step, _ in every_step_directory(run_directory)) or "none"


def mapping(value: object) -> Mapping[str, Any]:
    """Return a field of a manifest that should be an object; empty if it is none."""
    return cast("Mapping[str, Any]", value) if isinstance(value, dict) else {}


def recipe_setting(manifest: Mapping[str, Any], section: str, key: str) -> Any:
    """Return a value of the recipe that a manifest keeps, None if it doesn't."""
    return mapping(mapping(manifest.get("recipe")).get(section)).get(key)


def is_newer(manifest: Mapping[str, Any]) -> bool:
    """Return whether a manifest is of a format that came after this trainer."""
    version: object = manifest.get("version")
    return type(version) is int and version > layout.VERSION


def _all_held(run_directory: Path) -> tuple[Held, ...]:
    manifests: dict[int, dict[str, Any]] = {
        step: layout.read_manifest(path) or {} for step, path in every_step_directory(run_directory)
    }
    best = _best_step(manifests)
    found = [
        _held(step, path, manifests[step], step == best)
        for step, path in every_step_directory(run_directory)
        if step in manifests
    ]
    return tuple(held for held in found if not held.problems or held.directory.exists() or held.directory.is_symlink())


def _best_step(manifests: Mapping[int, Mapping[str, Any]]) -> int | None:
    """Return the step of the best evaluation, as the newest readable manifest knows it; None: the run keeps none."""
    readable = [step for step in manifests if manifests[step]]
    if not readable:
        return None
    newest = manifests[max(readable)]
    best: object = mapping(mapping(mapping(newest.get("state")).get("train")).get("best")).get("step")
    return best if type(best) is int and recipe_setting(newest, "checkpoint", "keep_best") is True else None


def _held(step: int, path: Path, manifest: Mapping[str, Any], best: bool) -> Held:
    world_size: object = manifest.get("world_size")
    created: object = manifest.get("created_unix")
    dtype: object = mapping(manifest.get("model")).get("dtype")
    topology = {key: value for key, value in mapping(manifest.get("topology")).items() if type(value) is int}
    every: object = recipe_setting(manifest, "checkpoint", "keep_every_steps")
    newer = is_newer(manifest)
    problems = [] if newer else layout.find_problems(path)
    if not newer and not problems and manifest.get("version") not in layout.VERSIONS:
        problems = [f"{layout.MANIFEST_NAME}: no format version is {manifest.get('version')!r}"]
    return Held(
        step=step,
        directory=path,
        num_bytes=_bytes_below(path),
        world_size=world_size if type(world_size) is int else None,
        topology=topology or None,
        dtype=dtype if isinstance(dtype, str) else None,
        created_unix=float(created) if isinstance(created, int | float) else None,
        milestone=type(every) is int and every > 0 and step % every == 0,
        best=best,
        newer=newer,
        problems=tuple(problems),
    )


def _bytes_below(path: Path) -> int:
    try:
        return sum(entry.lstat().st_size for entry in path.iterdir() if not entry.is_dir())
    except OSError:
        return 0


def _read_pointer(run_directory: Path) -> tuple[int | None, str | None]:
    """Return (step that ``latest`` names, why it names none)."""
    name = layout.POINTER_NAME
    try:
        with layout.pointer_path(run_directory).open("rb") as file:
            text = file.read(4096).decode("ascii", "replace").strip()
    except OSError as error:
        return None, f"{name}: {error.strerror}"
    step = layout.parse_step_name(text)
    if step is None:
        return None, f"{name} names {text[:40]!r}, which is no checkpoint"
    return step, None


def _pointer_problem(step: int, held: Mapping[int, Held]) -> str | None:
    if step not in held:
        return f"{layout.POINTER_NAME} names step {step}, which is not there"
    if held[step].problems:
        return f"{layout.POINTER_NAME} names step {step}, which is not complete"
    return None


def _pointer_leftovers(run_directory: Path) -> list[Path]:
    try:
        paths = list(layout.checkpoints_directory(run_directory).iterdir())
    except OSError:
        return []
    return sorted(path for path in paths if _POINTER_LEFTOVER.fullmatch(path.name))


def shape_text(world_size: int | None, topology: Mapping[str, int] | None) -> str:
    """Return ranks and what they were divided into: "8 (pipeline 2 x tensor 2), ZeRO-1"."""
    if world_size is None:
        return "?"
    if topology is None:
        return str(world_size)
    axes = ("pipeline", "tensor", "sequence", "expert")
    degrees = [f"{axis} {topology[axis]}" for axis in axes if topology.get(axis, 1) > 1]
    divided = f" ({' x '.join(degrees)})" if degrees else ""
    stage = topology.get("zero_stage")
    return f"{world_size}{divided}{f', ZeRO-{stage}' if stage is not None else ''}"
