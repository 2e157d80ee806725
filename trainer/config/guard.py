"""What is done about steps that can't be right."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.config.section import Section


class GuardConfig(Section):
    """Policy for NaN, Inf and spikes of loss and gradient norm, and for copies of weights that differ."""

    on_nan: Literal["skip", "rewind", "stop"] = "skip"
    """What a NaN or Inf loss or gradient leads to; the step never changes the weights."""
    on_spike: Literal["ignore", "skip", "rewind", "stop"] = "ignore"
    """What a spike of the loss or of the gradient norm leads to; `ignore` says it and goes on."""
    window_steps: int = Field(default=128, ge=8)
    """Newest steps that a step is compared with; judged once there are half as many."""
    warmup_steps: int = Field(default=100, ge=0)
    """First steps of the run, in which nothing counts as a spike."""
    deviations: float = Field(default=10.0, gt=0)
    """Standard deviations above the median of the window that make a spike; robust, of the norm's logarithm."""
    minimum_loss_rise: float = Field(default=0.1, ge=0)
    """Share of the median by which the loss must have risen at least."""
    minimum_norm_ratio: float = Field(default=5.0, ge=1)
    """Multiple of the median that the gradient norm must have reached at least."""
    patience_steps: int = Field(default=3, ge=1)
    """Spikes in a row before `rewind` or `stop`; until then they are applied."""
    max_rewinds: int = Field(default=3, ge=1)
    """Rewinds within `rewind_period_steps`, after which the run stops with exit code 93."""
    rewind_period_steps: int = Field(default=1000, ge=1)
    """Steps around a rewind in which others count against `max_rewinds`."""
    replica_check_every_steps: int | None = Field(default=1000, ge=1)
    """Compare weights that ranks hold copies of, bit by bit, every so many steps and before each save; null: never."""
