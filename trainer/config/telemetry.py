"""What is recorded, and the section that later features widen: task."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.config.section import Section


class TaskConfig(Section):
    """What a sample is and which tokens count."""

    name: Literal["pretrain"] = "pretrain"
    """Every token of every document is a target."""


class TelemetryConfig(Section):
    """Where the numbers go."""

    log_every_steps: int = Field(default=1, ge=1)
    """Steps between lines of metrics.jsonl and points in TensorBoard."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    log_cap_bytes: int | None = Field(default=200_000_000, ge=10_000)
    """Most that the log of a rank takes, the part that was put aside included; older lines are lost. Null: no cap."""
    wandb: None = None
    """Not available yet."""
