"""Write a checkpoint so that it either exists whole or does not exist.

Temporary directory → every rank's shard written, fsynced, hashed → all ranks agree → manifest → rename → fsync of the
parent → pointer. A kill anywhere leaves the previous checkpoint as it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.checkpoint import layout, random_state
from trainer.checkpoint.agreement import Ranks
from trainer.checkpoint.retention import to_delete
from trainer.checkpoint.shard_file import Entry, write_shard
from trainer.core import faults
from trainer.core.durable import fsync_directory, replace_text, write_durably
from trainer.core.errors import CheckpointError
from trainer.core.private import directory_mode
from trainer.engine.base import StateSlice
from trainer.parallel.cut import Cut


def slice_key(name: str, key: str) -> str:
    """Return the name of a slice inside a shard."""
    return f"{name}::{key}"


@dataclass
class _Shard:
    """What one rank reports."""

    file: str
    error: str | None = None
    bytes: int = 0
    xxh3_64: str = ""
    slices: list[tuple[str, str, str, tuple[int, ...], int, int, Cut | None]] = field(default_factory=list)
    """(name, key, dtype, shape, start, count, cut)"""


class CheckpointWriter:
    """Writes checkpoints of one run; called by all ranks together."""

    def __init__(
        self, run_directory: Path, ranks: Ranks, *, attempt: str, keep_last: int, keep_every_steps: int | None
    ) -> None:
        self._run = run_directory
        self._ranks = ranks
        self._attempt = attempt
        self._keep_last = keep_last
        self._keep_every_steps = keep_every_steps
        if ranks.rank == 0:
            layout.checkpoints_directory(run_directory).mkdir(mode=directory_mode(), parents=True, exist_ok=True)
            for leftover in layout.temporary_directories(run_directory):
                shutil.rmtree(leftover, ignore_errors=True)

    def write(self, step: int, slices: Iterable[StateSlice], facts: dict[str, Any]) -> Path:
        """Commit the checkpoint of ``step`` and return its directory; ``facts`` are further fields of its manifest.

        Raises CheckpointError on every rank alike when any rank failed; nothing is committed then and the previous
        checkpoint stands.
        """
        final = layout.step_directory(self._run, step)
        temporary = layout.temporary_directory(self._run, step, self._attempt)
        self._together(lambda: self._prepare(temporary), f"step {step}: directory not made")
        shard = self._write_shard(temporary, step, slices)
        shards = self._ranks.gather(shard)
        failed = [f"rank {rank}: {s.error}" for rank, s in enumerate(shards) if s.error]
        if failed:
            self._discard(temporary)
            raise CheckpointError(f"checkpoint of step {step} was not written: " + "; ".join(failed))
        manifest = _manifest(step, shards, facts, self._ranks.world_size)
        self._together(lambda: self._commit(step, temporary, final, manifest), f"step {step}: not committed")
        self._together(self._prune, "old checkpoints not deleted")
        return final

    def _together(self, action: Callable[[], None], what: str) -> None:
        """Run ``action`` on rank 0 only; every rank learns how it ended."""
        error: str | None = None
        if self._ranks.rank == 0:
            try:
                action()
            except OSError as failure:
                error = str(failure)
        error = self._ranks.from_first(error)
        if error is not None:
            raise CheckpointError(f"checkpoint: {what}: {error}")

    def _prepare(self, temporary: Path) -> None:
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(mode=directory_mode())

    def _write_shard(self, temporary: Path, step: int, slices: Iterable[StateSlice]) -> _Shard:
        rank = self._ranks.rank
        shard = _Shard(f"rank-{rank:05d}.safetensors")
        path = temporary / shard.file
        try:
            faults.reach("checkpoint.before_shard", rank=rank, step=step)
            mine = [piece for piece in slices if piece.primary]
            entries = [Entry(slice_key(p.name, p.key), p.dtype, p.count, lambda p=p: p.tensor) for p in mine]
            entries += [Entry.of(key, tensor) for key, tensor in random_state.capture().items()]
            shard.bytes, shard.xxh3_64 = write_shard(path, entries)
            faults.reach("checkpoint.shard_written", rank=rank, step=step, path=path)
            shard.slices = [
                (p.name, p.key, str(p.dtype).removeprefix("torch."), p.shape, p.start, p.count, p.cut) for p in mine
            ]
        except (OSError, RuntimeError) as failure:
            shard.error = str(failure)
        return shard

    def _commit(self, step: int, temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
        faults.reach("checkpoint.before_manifest", rank=0, step=step)
        path = layout.manifest_path(temporary)
        write_durably(path, json.dumps(manifest, separators=(",", ":")))
        fsync_directory(temporary)
        faults.reach("checkpoint.before_rename", rank=0, step=step, path=path)
        if final.exists():  # a damaged one of this step, passed over at resume; the new one replaces it
            aside = temporary.with_name(temporary.name + "-replaced")
            final.rename(aside)
            temporary.rename(final)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            temporary.rename(final)
        fsync_directory(final.parent)
        faults.reach("checkpoint.before_pointer", rank=0, step=step)
        replace_text(layout.pointer_path(self._run), final.name + "\n")
        faults.reach("checkpoint.committed", rank=0, step=step)

    def _prune(self) -> None:
        steps = [step for step, _ in layout.step_directories(self._run)]
        for step in to_delete(steps, self._keep_last, self._keep_every_steps):
            doomed = layout.step_directory(self._run, step)
            aside = layout.temporary_directory(self._run, step, "deleted")
            # Renamed first: half a deleted checkpoint must not look like one.
            doomed.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)

    def _discard(self, temporary: Path) -> None:
        if self._ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def _manifest(step: int, shards: list[_Shard], facts: dict[str, Any], world_size: int) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for index, shard in enumerate(shards):
        for name, key, dtype, shape, start, count, cut in shard.slices:
            entry = tensors.setdefault(name, {"shape": list(shape), "states": {}})
            kept = entry["states"].setdefault(key, {"dtype": dtype, "slices": []})
            kept["slices"].append([index, start, count, *([cut.to_json()] if cut else [])])
    any_cut = any(cut is not None for shard in shards for *_, cut in shard.slices)
    return {
        "format": layout.FORMAT,
        "version": layout.VERSION if any_cut else layout.VERSION_WITHOUT_CUTS,
        "step": step,
        "world_size": world_size,
        "shards": [shard.file for shard in shards],
        "files": {shard.file: {"bytes": shard.bytes, "xxh3_64": shard.xxh3_64} for shard in shards},
        "tensors": tensors,
        **facts,
    }
