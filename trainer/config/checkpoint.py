"""When checkpoints are written, which are kept, and what a start does with them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.config.section import Section

Change = Literal["data", "optimizer", "frozen"]


class CheckpointConfig(Section):
    """Checkpoints are logical tensors + one JSON manifest; they load at any ZeRO stage and world size."""

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; null: only at the end and on a signal."""
    keep_last: int = Field(default=3, ge=1)
    """Newest checkpoints to keep."""
    keep_every_steps: int | None = Field(default=None, ge=1)
    """Checkpoints at multiples of this are never deleted."""
    keep_best: bool = False
    """Save after every evaluation that is the best so far, and never delete the best one. What is compared:
    ``evaluation.early_stopping.metric``, or the mean over ``data.validation``."""
    asynchronous: bool = True
    """Write in the background: training stands still only while state is copied to memory, which is kept for it: as
    much as a rank writes. Where that does not fit, or state lies on NVMe, training waits, and says so."""
    on_error: Literal["continue", "stop"] = "continue"
    """When a checkpoint can't be written: go on and try the next one, or end the run. The last one must be written."""
    files: Literal["auto", "rank", "node"] = "auto"
    """A file a rank, or one a node, which keeps files few. auto: a node where there are more than 64 ranks."""
    hook: tuple[str, ...] | None = None
    """Command that is run after each commit, beside training: a list of arguments, in which {directory} and {step} are
    the checkpoint's, {run} the run's. No shell. Its output goes to RUN/logs/hook.log."""
    hook_timeout_seconds: float = Field(default=600.0, gt=0, le=800)
    """How long it may take. A run that has finished waits as long for it, one that was asked to stop does not wait."""
    resume: Literal["auto", "require", "never"] = "auto"
    """auto: continue from the newest undamaged checkpoint, if there is one; require: refuse to start without one, or
    where the newest is damaged; never: refuse if there is one."""
    accept_changes: tuple[Change, ...] = ()
    """Differences from the checkpoint to go on with. ``data``: other data, weights of sources, seed or sequence length.
    ``optimizer``: another one, which starts afresh. ``frozen``: other parameters are trained than before; those that
    were frozen start without optimizer state."""
    accept_changed_data: bool = False
    """Old name of ``accept_changes: [data]``."""

    @property
    def accepted(self) -> frozenset[Change]:
        """``accept_changes``, whichever name it was given by."""
        return frozenset((*self.accept_changes, *(("data",) if self.accept_changed_data else ())))
