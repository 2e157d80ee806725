"""Write a checkpoint so that it either exists whole or does not exist, in the background if asked to.

Temporary directory → every rank's section written, fsynced, hashed → all ranks agree → manifest → rename → fsync of
the parent → pointer → old ones deleted. A kill anywhere leaves the previous checkpoint as it was. In the background the
same happens on a thread of every rank, over connections of its own, from a copy in memory that is made before.
"""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import random_state
from trainer.checkpoint.agreement import Ranks
from trainer.checkpoint.commit import Commit
from trainer.checkpoint.sections import Holding, Plan, Section, make_plan
from trainer.checkpoint.shard_file import Entry, Image, padded, streamed, write_section
from trainer.checkpoint.space import free_memory_bytes
from trainer.config.checkpoint import CheckpointConfig
from trainer.core import faults, phases
from trainer.core.errors import CheckpointError
from trainer.core.units import format_bytes
from trainer.engine.base import StateSlice

_LOOK_SECONDS = 1.0
"""Between two looks at whether the save that is waited for moves on."""


def slice_key(name: str, key: str) -> str:
    """Return the name of a slice inside a shard."""
    return f"{name}::{key}"


@dataclass
class Saved:
    """How a save ended; the same on every rank, but for the durations."""

    step: int
    directory: Path
    num_bytes: int
    """Of all ranks."""
    blocked_seconds: float
    """That training stood still for this save, waiting for its end included."""
    seconds: float
    """From the call until all was durable."""
    error: str | None = None
    """Why nothing was committed."""
    warning: str | None = None
    """What went wrong after the commit."""


class CheckpointWriter:
    """Writes checkpoints of one run; called by all ranks together."""

    def __init__(
        self,
        run_directory: Path,
        *,
        attempt: str,
        settings: CheckpointConfig,
        may_commit: Callable[[], None] = lambda: None,
        ranks: Ranks | None = None,
    ) -> None:
        """``may_commit`` is asked on rank 0 before a commit and raises CheckpointError to forbid it. Collective.

        ``ranks``, made by Ranks.apart, are this writer's from now on.
        """
        self._ranks = ranks or Ranks.apart()
        self._commit = Commit(run_directory, attempt, settings, may_commit)
        self._settings = settings
        self._section: Section | None = None
        self._plan: Plan | None = None
        self._places: list[tuple[str, str, int]] = []
        self._image: Image | None = None
        self._thread: threading.Thread | None = None
        self._in_flight: Saved | None = None
        self._broken = False
        if self._ranks.rank == 0:
            self._commit.reap()

    def prepare(self, slices: Iterable[StateSlice]) -> list[str]:
        """Agree on who writes what and allocate the buffers of background saves. Collective.

        Returns sentences for the user, on rank 0: the memory of the buffers, or why saves can't be in the background
        though they are asked to be, and whether space is short.
        """
        mine, entries = self._mine(slices)
        background = self._settings.asynchronous and all(isinstance(piece.held, torch.Tensor) for piece in mine)
        holding = Holding(
            host=socket.gethostname(),
            places=tuple(entry.place for entry in entries),
            num_bytes=sum(entry.num_bytes for entry in entries),
            slices=tuple(
                (p.name, p.key, str(p.dtype).removeprefix("torch."), p.shape, p.start, p.count, p.cut) for p in mine
            ),
            free_memory_bytes=free_memory_bytes(),
            buffered=background,
        )
        holdings = self._ranks.to_first(holding)
        self._plan = make_plan(holdings, self._settings.files) if holdings else None
        dealt = None
        if holdings and self._plan:
            possible = self._plan.fits_in_memory and all(held.buffered for held in holdings)
            dealt = [(section, possible, self._plan.num_bytes) for section in self._plan.sections]
        self._section, possible, self._num_bytes = self._ranks.deal(dealt)
        self._places = [entry.place for entry in entries]
        if possible:
            pinned = any(isinstance(piece.held, torch.Tensor) and piece.held.is_cuda for piece in mine)
            possible = self._allocate(self._section.header, [*entries, *self._padding()], pinned)
        if self._plan is None:
            return []
        said: list[str] = []
        if possible:
            most = format_bytes(max(padded(held.num_bytes) for held in holdings or [holding]))
            said.append(
                f"checkpoints: {format_bytes(self._num_bytes)}, written in the background from {most} of memory a rank"
            )
        elif self._settings.asynchronous:
            why = "a copy of it does not fit into memory" if background else "state lies on NVMe"
            said.append(f"checkpoints: {format_bytes(self._num_bytes)}, written while training waits: {why}")
        lacks = self._commit.short_of_space(self._plan)
        return [*said, lacks] if lacks else said

    def _allocate(self, header: bytes, entries: list[Entry], pinned: bool) -> bool:
        """Make the buffers, on every rank or on none. Return whether they are there."""
        try:
            self._image = Image(header, entries, pinned)
        except (RuntimeError, MemoryError, OSError):
            self._image = None
        if not all(self._ranks.gather(self._image is not None)):
            self._image = None
        return self._image is not None

    def save(
        self,
        step: int,
        slices: Iterable[StateSlice],
        facts: dict[str, Any],
        *,
        wait: bool,
        protected: Collection[int] = (),
    ) -> Saved | None:
        """Commit the checkpoint of ``step``; ``facts`` are further fields of its manifest.

        With ``wait`` return how it ended, on every rank alike; else begin, if the buffers are there, and return None:
        ``finish`` tells. ``finish`` must have been called since the last one was begun. Checkpoints of the steps
        ``protected`` are not deleted.
        """
        assert self._thread is None
        started = phases.working_seconds()
        if self._section is None:
            slices = list(slices)
            self.prepare(slices)
        if any(Ranks().gather(self._broken)):  # a timeout closes connections for good
            self._ranks, self._broken = Ranks.apart(), False
        rank = self._ranks.rank
        faults.reach("checkpoint.begin", rank=rank, step=step)
        _, entries = self._mine(slices)
        assert [entry.place for entry in entries] == self._places, "state has changed its shape"
        saved = Saved(step, self._commit.directory(step), self._num_bytes, 0.0, 0.0)
        if self._image is not None:
            self._image.fill([*entries, *self._padding()])
            faults.reach("checkpoint.copied", rank=rank, step=step)
        if self._image is None or wait:
            self._write(saved, entries, facts, protected, started)
            saved.blocked_seconds = saved.seconds
            return saved
        self._in_flight = saved
        self._thread = threading.Thread(
            target=self._write_beside, args=(saved, [], facts, protected, started), name="checkpoint", daemon=True
        )
        self._thread.start()
        saved.blocked_seconds = phases.working_seconds() - started
        return None

    @property
    def busy(self) -> bool:
        """Whether a save is in flight, or how it ended has not been asked."""
        return self._thread is not None

    def finished(self) -> Saved | None:
        """Return how the save in flight ended, None while it has not; does not wait. Not the same on every rank."""
        return self._in_flight if self._thread is not None and not self._thread.is_alive() else None

    def finish(self, timeout_seconds: float | None = None) -> Saved | None:
        """Wait for the save in flight and return how it ended, None if there is none (or it takes too long)."""
        if self._thread is None:
            return None
        started, seen = phases.working_seconds(), phases.board.advances_beside
        end = math.inf if timeout_seconds is None else started + timeout_seconds
        while self._thread.is_alive() and (left := end - phases.working_seconds()) > 0:
            self._thread.join(min(_LOOK_SECONDS, left))
            if phases.board.advances_beside != seen:  # waiting for a thread that is stuck is no progress
                seen = phases.board.advances_beside
                phases.board.advance()
        if self._thread.is_alive():
            return None
        saved, self._thread, self._in_flight = self._in_flight, None, None
        assert saved is not None
        saved.blocked_seconds += phases.working_seconds() - started
        return saved

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints of steps after ``step``; none may be in flight. Collective.

        Raises CheckpointError, on every rank alike, if they can't be deleted: a restart would go on from them.
        """
        error = self._ranks.from_first(_said(lambda: self._commit.drop_after(step)) if self._ranks.rank == 0 else None)
        if error is not None:
            raise CheckpointError(f"checkpoints after step {step} can't be deleted: {error}")

    def meet(self) -> None:
        """Return when every rank is here."""
        self._ranks.wait()

    def _mine(self, slices: Iterable[StateSlice]) -> tuple[list[StateSlice], list[Entry]]:
        mine = [piece for piece in slices if piece.primary]
        entries = [Entry(slice_key(p.name, p.key), p.dtype, p.count, lambda p=p: p.tensor) for p in mine]
        return mine, entries + [Entry.of(key, tensor) for key, tensor in random_state.capture().items()]

    def _padding(self) -> list[Entry]:
        assert self._section is not None
        count = self._section.padding
        return [Entry.of("padding", torch.zeros(count, dtype=torch.uint8))] if count else []

    def _write_beside(self, *arguments: Any) -> None:
        """Write on this thread: what it agrees on says nothing of where training is."""
        phases.board.quiet_threads.add(threading.get_ident())
        try:
            self._write(*arguments)
        finally:
            phases.board.quiet_threads.discard(threading.get_ident())

    def _write(
        self, saved: Saved, entries: list[Entry], facts: dict[str, Any], protected: Collection[int], started: float
    ) -> None:
        """Carry out the protocol and note in ``saved`` how it ended. On a thread: nothing may be raised."""
        try:
            saved.error, saved.warning = self._protocol(saved.step, entries, facts, protected)
        except Exception as error:  # noqa: BLE001 - connections are lost: another rank is gone, or was too slow
            saved.error, self._broken = f"{type(error).__name__}: {error}", True
        if saved.error is not None:
            saved.error = f"checkpoint of step {saved.step} was not written: {saved.error}"
        saved.seconds = phases.working_seconds() - started

    def _protocol(
        self, step: int, entries: list[Entry], facts: dict[str, Any], protected: Collection[int]
    ) -> tuple[str | None, str | None]:
        """Return (error, warning), the same on every rank."""
        plan, ranks = self._plan, self._ranks
        error = ranks.from_first(_said(lambda: self._commit.begin(step, plan)) if plan else None)
        if error is not None:
            return error, None
        reports = ranks.to_first(self._write_section(step, entries))
        error = warning = None
        if plan is not None and reports is not None:
            failed = [f"rank {rank}: {report}" for rank, report in enumerate(reports) if isinstance(report, str)]
            if failed:
                error = "; ".join(failed)
            else:
                written = [report for report in reports if not isinstance(report, str)]
                error = _said(lambda: self._commit.commit(step, plan, written, facts))
            if error is not None:
                self._commit.discard(step)
            else:
                warning = _said(lambda: self._commit.finish(step, protected))
        return ranks.from_first((error, warning))

    def _write_section(self, step: int, entries: list[Entry]) -> tuple[int, str] | str:
        """Return bytes and hash of what this rank wrote, or what went wrong."""
        assert self._section is not None
        rank, path = self._ranks.rank, self._commit.temporary(step) / self._section.file
        try:
            faults.reach("checkpoint.before_shard", rank=rank, step=step, path=path)
            image = self._image
            chunks = image.chunks() if image else streamed(self._section.header, [*entries, *self._padding()])

            def after_chunk() -> None:
                phases.board.advance()
                faults.reach("checkpoint.in_shard", rank=rank, step=step, path=path)

            written = write_section(path, self._section.start, chunks, after_chunk)
            faults.reach("checkpoint.shard_written", rank=rank, step=step, path=path)
        except Exception as failure:  # noqa: BLE001 - whatever it is, the others are waiting for this rank's word
            return str(failure) if str(path) in str(failure) else f"{path.name}: {failure}"
        return written


def _said(action: Callable[[], None]) -> str | None:
    """Return what went wrong in ``action``, None if nothing did."""
    try:
        action()
    except Exception as failure:  # noqa: BLE001 - whatever it is, the others are waiting for this rank's word
        return str(failure)
    return None
