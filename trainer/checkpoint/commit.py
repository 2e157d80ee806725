"""Rank 0's part of a save: make room, commit, delete old checkpoints. No step here needs another rank."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint import layout
from trainer.checkpoint.retention import to_delete
from trainer.checkpoint.sections import Plan
from trainer.checkpoint.space import lacks_space
from trainer.config.checkpoint import CheckpointConfig
from trainer.core import faults
from trainer.core.durable import delete_leftovers, fsync_directory, replace_text, write_durably
from trainer.core.errors import CheckpointError
from trainer.core.private import directory_mode


class Commit:
    """The directory of checkpoints, as the one that writes there sees it."""

    def __init__(
        self, run_directory: Path, attempt: str, settings: CheckpointConfig, may_commit: Callable[[], None]
    ) -> None:
        self._run = run_directory
        self._attempt = attempt
        self._settings = settings
        self._may_commit = may_commit

    def reap(self) -> None:
        """Delete what interrupted saves left. Raises OSError if the directory of checkpoints can't be made."""
        layout.checkpoints_directory(self._run).mkdir(mode=directory_mode(), parents=True, exist_ok=True)
        delete_leftovers(layout.checkpoints_directory(self._run))
        put_back(self._run)
        for leftover in layout.temporary_directories(self._run):
            step = layout.parse_replaced_name(leftover.name)
            if step is None or self.directory(step).exists():  # else it is the only one of its step
                shutil.rmtree(leftover, ignore_errors=True)

    def directory(self, step: int) -> Path:
        """Return where the checkpoint of ``step`` will be."""
        return layout.step_directory(self._run, step)

    def temporary(self, step: int) -> Path:
        """Return where it is written."""
        return layout.temporary_directory(self._run, step, self._attempt)

    def short_of_space(self, plan: Plan) -> str | None:
        """Return a warning if not all of the checkpoints that are to be kept will fit."""
        held = len(layout.step_directories(self._run))
        coming = max(1, self._settings.keep_last + 1 - held)
        directory = layout.checkpoints_directory(self._run)
        try:
            lacks = lacks_space(directory, coming * plan.num_bytes, coming * (len(set(plan.shards)) + 2))
        except OSError:
            return None
        return f"warning: {lacks} for {coming} checkpoint{'s' * (coming > 1)}" if lacks else None

    def begin(self, step: int, plan: Plan) -> None:
        """Make the temporary directory. Raises OSError, or CheckpointError where the file system has no room."""
        lacks = lacks_space(layout.checkpoints_directory(self._run), plan.num_bytes, len(set(plan.shards)) + 2)
        if lacks:
            raise CheckpointError(lacks)
        self.reap()  # one is written at a time: whatever lies there is of a save that failed
        self.temporary(step).mkdir(mode=directory_mode())

    def commit(self, step: int, plan: Plan, written: Sequence[tuple[int, str]], facts: dict[str, Any]) -> None:
        """Make the checkpoint exist; ``written`` is (bytes, hash) of every rank's section. Raises OSError.

        Raises CheckpointError if this run may not commit any more.
        """
        temporary, final = self.temporary(step), self.directory(step)
        self._may_commit()
        faults.reach("checkpoint.before_manifest", rank=0, step=step)
        path = layout.manifest_path(temporary)
        write_durably(path, layout.manifest_text(manifest(step, plan, written, facts)))
        fsync_directory(temporary)
        faults.reach("checkpoint.before_rename", rank=0, step=step, path=path)
        if final.exists():  # damaged and passed over at resume, or what a rewind went back to: the new one replaces it
            aside = layout.replaced_directory(temporary)
            final.rename(aside)
            faults.reach("checkpoint.in_replace", rank=0, step=step)
            temporary.rename(final)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            temporary.rename(final)
        fsync_directory(final.parent)

    def finish(self, newest: int, protected: Collection[int]) -> None:
        """Point at the checkpoint that was committed, and delete those that need not be kept now. Raises OSError."""
        faults.reach("checkpoint.before_pointer", rank=0, step=newest)
        replace_text(layout.pointer_path(self._run), self.directory(newest).name + "\n")
        faults.reach("checkpoint.committed", rank=0, step=newest)
        self.prune(newest, protected)

    def prune(self, newest: int, protected: Collection[int]) -> None:
        """Delete checkpoints that need not be kept, now that that of step ``newest`` is there. Raises OSError."""
        # Later ones were passed over at the start, as damaged: they count for nothing.
        steps = [step for step in layout.steps_with_manifest(self._run) if step <= newest]
        for step in to_delete(steps, self._settings.keep_last, self._settings.keep_every_steps, protected):
            faults.reach("checkpoint.before_prune", rank=0, step=step)
            aside = layout.temporary_directory(self._run, step, "deleted")
            # Renamed first: half a deleted checkpoint must not look like one.
            self.directory(step).rename(aside)
            faults.reach("checkpoint.in_prune", rank=0, step=step)
            shutil.rmtree(aside, ignore_errors=True)

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints of later steps: the run has gone back to ``step``. Raises OSError."""
        self._may_commit()
        replace_text(layout.pointer_path(self._run), self.directory(step).name + "\n")
        for later, path in layout.step_directories(self._run):
            if later > step:
                aside = layout.temporary_directory(self._run, later, "deleted")
                path.rename(aside)
                shutil.rmtree(aside, ignore_errors=True)

    def discard(self, step: int) -> None:
        """Delete what was written of a checkpoint that failed; the one that it should have replaced stays."""
        put_back(self._run)
        shutil.rmtree(self.temporary(step), ignore_errors=True)


def put_back(run_directory: Path) -> None:
    """Give checkpoints their name again that were about to be replaced when the save was killed, or failed.

    To be called by the only writer of the run, before anybody looks for checkpoints. What can't be renamed stays.
    """
    for aside in reversed(layout.temporary_directories(run_directory)):
        step = layout.parse_replaced_name(aside.name)
        if step is None or (final := layout.step_directory(run_directory, step)).exists():
            continue
        with contextlib.suppress(OSError):
            aside.rename(final)
            fsync_directory(final.parent)


def manifest(step: int, plan: Plan, written: Sequence[tuple[int, str]], facts: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of a checkpoint, as docs/interface.md tells it."""
    parts: dict[str, list[tuple[int, str]]] = {}
    for section, part in zip(plan.sections, written, strict=True):
        parts.setdefault(section.file, []).append(part)
    version = layout.VERSION_WITHOUT_CUTS
    if plan.any_cut:
        version = layout.VERSION_WITH_CUTS
    if plan.any_shared:
        version = layout.VERSION
    return {
        "format": layout.FORMAT,
        "version": version,
        "step": step,
        "world_size": len(plan.sections),
        "shards": plan.shards,
        "files": {name: layout.file_facts(found) for name, found in parts.items()},
        "tensors": plan.tensors,
        **facts,
    }
