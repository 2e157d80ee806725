"""When checkpoints are written, which are kept, and what a start does with them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.config.section import Section


class CheckpointConfig(Section):
    """Checkpoints are logical tensors + one JSON manifest; they load at any ZeRO stage and world size."""

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; null: only at the end and on a signal."""
    keep_last: int = Field(default=3, ge=1)
    """Newest checkpoints to keep."""
    keep_every_steps: int | None = Field(default=None, ge=1)
    """Checkpoints at multiples of this are never deleted."""
    asynchronous: bool = False
    """Write in the background (not available yet)."""
    resume: Literal["auto", "require", "never"] = "auto"
    """auto: continue where a checkpoint is; require: refuse to start without one; never: refuse if there is one."""
    accept_changed_data: bool = False
    """Continue although the data, their weights or their order differ from what the checkpoint was trained on."""
