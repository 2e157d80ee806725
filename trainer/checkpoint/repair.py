"""Mend what can be mended safely in a run's directory of checkpoints. Nothing that holds state is deleted."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.checkpoint import layout
from trainer.checkpoint.doctor import Finding, examine, known_files
from trainer.checkpoint.survey import DAMAGED_NAME, Survey, recipe_setting, survey
from trainer.core.durable import fsync_directory, replace_text

_GROUP_READ = 0o050
_SHOWN = 5


@dataclass(frozen=True)
class Action:
    """One change: what it does, in words, and the doing. Raises OSError."""

    text: str
    do: Callable[[], None]


@dataclass
class Treatment:
    """What is to be done, in order, and what can't be mended."""

    actions: list[Action] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    hopeless: bool = False
    """No good checkpoint would be left: nothing may be changed."""


def plan_repair(run_directory: Path) -> Treatment:
    """Read all checkpoints and return what a repair does. Raises RefusedError where there are none."""
    found, known = survey(run_directory), known_files(run_directory)
    findings = {held.step: examine(held.directory, known) for held in found.checkpoints}
    good = [step for step, what in findings.items() if not any(f.damage or f.kind == "newer" for f in what)]
    treatment = Treatment()
    if not good:
        treatment.hopeless = True
        treatment.notes = [f"step {step}: {what[0].text}" for step, what in findings.items()]
        treatment.notes.append("no good checkpoint would be left: nothing is changed")
        return treatment
    for path in found.interrupted:
        treatment.actions.append(_removal(path))
    for held in found.checkpoints:
        _treat(held.directory, held.step, findings[held.step], treatment)
    _point(found, findings, max(good), treatment)
    _make_private(found, max(good), treatment)
    return treatment


def _treat(directory: Path, step: int, findings: Sequence[Finding], treatment: Treatment) -> None:
    damage = [finding for finding in findings if finding.damage]
    aside = directory.parent / DAMAGED_NAME
    for finding in findings:
        if finding.kind == "newer":
            treatment.notes.append(f"step {step} {finding.text}; it is left as it is")
    if damage:
        shown = [finding.text for finding in damage[:_SHOWN]]
        more = [f"and {len(damage) - _SHOWN} more"] if len(damage) > _SHOWN else []
        text = "\n    ".join([f"step {step} is damaged, moved to {aside.name}/:", *shown, *more])
        treatment.actions.append(Action(text, lambda: _move(directory, aside)))
        if any(finding.kind == "manifest" for finding in damage):
            treatment.notes.append(f"step {step}: a manifest can't be rebuilt from shards: restore it from a copy")
        return
    for finding in findings:
        if finding.kind == "foreign":
            path = directory / finding.text.split(":", 1)[0]
            target = aside / f"{directory.name}-foreign"
            text = f"step {step}: {path.name} does not belong there: moved to {aside.name}/{target.name}/"
            treatment.actions.append(Action(text, lambda path=path, target=target: _move(path, target)))


def _point(found: Survey, findings: dict[int, list[Finding]], newest: int, treatment: Treatment) -> None:
    """Let ``latest`` name the newest good checkpoint, unless it names one that only a newer trainer reads."""
    pointed = found.pointed
    newer = pointed is not None and any(finding.kind == "newer" for finding in findings.get(pointed, ()))
    if pointed == newest or (newer and found.pointer_problem is None):
        return
    named = found.pointer_problem or f"{layout.POINTER_NAME} names step {pointed}"
    text = f"{named}: it now names step {newest}, the newest good one"
    path, name = layout.pointer_path(found.run_directory), layout.step_name(newest)

    def rewrite() -> None:
        if path.is_dir() and not path.is_symlink():
            _move(path, path.parent / DAMAGED_NAME)
        replace_text(path, name + "\n")

    treatment.actions.append(Action(text, rewrite))


def _make_private(found: Survey, newest: int, treatment: Treatment) -> None:
    """Take from others, and from the group where the recipe doesn't let it read, what they may do.

    A file in a closed directory is out of reach whatever its mode: directories decide whether anything is to be done.
    """
    run_directory = found.run_directory
    manifest = layout.read_manifest(layout.step_directory(run_directory, newest)) or {}
    group = _GROUP_READ if recipe_setting(manifest, "run", "group_access") == "read" else 0
    open_paths = [path for path in _own_paths(run_directory) if path.is_dir() and _excess(path, group)]
    open_paths = [path for path in open_paths if not {path, *path.parents} & {*found.interrupted}]
    if not open_paths:
        return
    names = ", ".join(path.name for path in open_paths[:4]) + (", ..." if len(open_paths) > 4 else "")
    text = f"others may look into {names}: made private"

    def close() -> None:
        for path in (path for path in _own_paths(run_directory) if _excess(path, group)):
            path.chmod(stat.S_IMODE(path.lstat().st_mode) & (0o7700 | group))

    treatment.actions.append(Action(text, close))


def _own_paths(run_directory: Path) -> Iterator[Path]:
    """Yield the directory of checkpoints and all that is in it, links left out."""
    top = layout.checkpoints_directory(run_directory)
    yield from (path for path in (top, *sorted(top.rglob("*"))) if not path.is_symlink())


def _excess(path: Path, group: int) -> int:
    return stat.S_IMODE(path.lstat().st_mode) & 0o077 & ~group


def _removal(path: Path) -> Action:
    def remove() -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    return Action(f"{path.name} is what an interrupted save or deletion left: removed", remove)


def _move(path: Path, directory: Path) -> None:
    """Rename ``path`` into ``directory``, under a name that is free there."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    target, number = directory / path.name, 1
    while target.exists() or target.is_symlink():
        number += 1
        target = directory / f"{path.name}-{number}"
    path.rename(target)
    fsync_directory(directory)
    fsync_directory(path.parent)
