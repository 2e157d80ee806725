"""Checkpoints as the loop sees them: when to wait, what a failure means, who is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.checkpoint import layout
from trainer.checkpoint.hook import Hook
from trainer.checkpoint.writer import CheckpointWriter, Saved
from trainer.config.checkpoint import CheckpointConfig
from trainer.core import phases
from trainer.core.errors import CheckpointError
from trainer.core.units import format_bytes, format_duration
from trainer.engine.base import TrainEngine
from trainer.resilience.control import Save
from trainer.telemetry.record import CheckpointRecord
from trainer.telemetry.sinks.base import Fanout
from trainer.training.state import TrainState

_RESCUE_SECONDS = 30.0
"""What a failing rank gives a save in flight: the others must not wait long for its end."""


def newest_good_step(run_directory: Path, saved_step: int, bad_since: int | None) -> int:
    """Return the step of the checkpoint that a rewind would go back to, -1 if there is none.

    A start in the middle of bad steps continues from ``saved_step``, which was saved among them.
    """
    if bad_since is None:
        return saved_step
    return max((step for step in layout.steps_with_manifest(run_directory) if step < bad_since), default=-1)


class Saver:
    """Saves the state of a run; called by all ranks together, but for what says otherwise."""

    def __init__(
        self,
        writer: CheckpointWriter,
        engine: TrainEngine,
        state: TrainState,
        facts: Callable[[], dict[str, Any]],
        settings: CheckpointConfig,
        sinks: Fanout,
        hook: Hook | None,
        saved_step: int,
        good_step: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """``facts`` returns further fields of a manifest; ``hook`` is given on rank 0 alone.

        ``saved_step`` is that of the newest checkpoint, ``good_step`` of the one a rewind would go back to; -1: none.
        ``check`` raises, on every rank alike, where the state is not worth saving.
        """
        self._check = check
        self._writer = writer
        self._engine = engine
        self._state = state
        self._facts = facts
        self._settings = settings
        self._sinks = sinks
        self._hook = hook
        self._saved_step = saved_step
        self._best_saved = state.best.step
        self._begun_as_best = False
        self._good_step = good_step
        self._begun_as_good = False
        self._told: Saved | None = None
        self._longest_seconds = 0.0
        """Of all saves so far, each from its call until it was durable."""

    @property
    def must_stop(self) -> bool:
        """Whether this rank knows of a failed save that ends the run; others may learn of it a moment later."""
        saved = self._writer.finished()
        return self._settings.on_error == "stop" and saved is not None and saved.error is not None

    @property
    def newest(self) -> Save | None:
        """How the last save has ended that the user was told of."""
        return Save(self._told.step, self._told.error) if self._told is not None else None

    def tell(self) -> None:
        """Tell the user of a save that has ended meanwhile. Does not wait, and changes nothing for other ranks."""
        saved = self._writer.finished()
        if saved is not None:
            self._tell(saved)
        if self._hook is not None:
            self._say(self._hook.poll())

    def save(self, *, final: bool) -> None:
        """Save the current state: in the background, or wait for the end if it is the ``final`` one.

        A failed save is reported and the next one tried; raises CheckpointError, on every rank alike, for the final
        one and under ``on_error: stop``.
        """
        self.settle()
        if self._saved_step == self._state.step:
            return
        phases.mark("save", step=self._state.step, detail="checking the state")
        self._check()
        if final:
            # Training has stood still for no save so long: those before were written in the background.
            allowed = phases.board.patience(self._longest_seconds)
            phases.board.mark("save", detail="writing the checkpoint", allowed_seconds=allowed)
        else:
            phases.mark("save", detail="copying the state")
        self._begun_as_good = self._state.guard.bad_since is None
        self._begun_as_best = self._state.best.step == self._state.step
        saved = self._writer.save(
            self._state.step, self._engine.iterate_state(), self._facts(), wait=final, protected=self._protected()
        )
        if saved is not None:
            self._end(saved, must_succeed=final)

    def close(self, *, wait: bool) -> None:
        """Let the hook run to its end if asked to ``wait``. All ranks leave together: launchers end what outlives one.

        A run that was asked to stop has no time for it: the hook goes on as long as the job lets it.
        """
        if self._hook is not None:
            self._say(self._hook.wait() if wait else self._hook.leave())
        self._writer.meet()

    def settle(self) -> None:
        """Wait for the save in flight. Raises CheckpointError under ``on_error: stop``."""
        if self._writer.busy:
            allowed = phases.board.patience(self._longest_seconds)
            step, detail = self._state.step, "waiting for the save before"
            phases.board.mark("save", step=step, detail=detail, allowed_seconds=allowed)
        saved = self._writer.finish()
        if saved is not None:
            self._end(saved, must_succeed=False)

    def go_back(self) -> None:
        """Follow a rewind: forget later checkpoints, and commit this step's again, with what the rewind left out.

        A kill before that is durable starts from the old one, and meets the same samples again.
        """
        self._writer.drop_after(self._state.step)
        self._saved_step, self._best_saved, self._good_step = -1, self._state.best.step, self._state.step
        self.save(final=False)

    def rescue(self) -> None:
        """Let a save in flight end, if it does soon: this rank is failing. Not collective."""
        saved = self._writer.finish(_RESCUE_SECONDS)
        if saved is not None:
            self._tell(saved)

    def _protected(self) -> set[int]:
        """Return the steps whose checkpoints must stay, whatever retention says."""
        steps = set(self._hook.protected) if self._hook else set[int]()
        if not self._begun_as_good:  # a rewind needs the newest checkpoint of before the bad steps
            steps.add(self._good_step)
        # That of the best evaluation before stays until the new one's has been committed.
        return steps | {self._state.best.step, self._best_saved} if self._settings.keep_best else steps

    def _end(self, saved: Saved, *, must_succeed: bool) -> None:
        self._longest_seconds = max(self._longest_seconds, saved.seconds)
        if saved.error is not None and (must_succeed or self._settings.on_error == "stop"):
            raise CheckpointError(saved.error)
        self._tell(saved)
        if saved.error is None:
            self._saved_step = saved.step
            if self._begun_as_good:
                self._good_step = saved.step
            if self._begun_as_best:
                self._best_saved = saved.step

    def _tell(self, saved: Saved) -> None:
        if saved is self._told:
            return
        self._told = saved
        if saved.error is not None:
            goes_on = "; training goes on" if self._settings.on_error == "continue" else ""
            self._sinks.message(f"warning: {saved.error}{goes_on}")
            return
        self._sinks.checkpoint(
            CheckpointRecord(
                step=saved.step,
                blocked_seconds=saved.blocked_seconds,
                seconds=saved.seconds,
                num_bytes=saved.num_bytes,
                time_unix=time.time(),
            )
        )
        blocked, seconds = format_duration(saved.blocked_seconds), format_duration(saved.seconds)
        how = f"in {seconds}" if blocked == seconds else f"in {seconds}, training stood {blocked}"
        self._sinks.message(f"checkpoint {saved.directory.name}: {format_bytes(saved.num_bytes)} {how}")
        if saved.warning is not None:
            self._sinks.message(
                f"warning: {saved.directory.name} was committed, but what follows failed: {saved.warning}"
            )
        if self._hook is not None:
            self._say(self._hook.committed(saved.step, saved.directory))

    def _say(self, sentences: list[str]) -> None:
        for sentence in sentences:
            self._sinks.message(sentence)
