"""What is done about steps that can't be right."""

from __future__ import annotations

from typing import Literal

from trainer.config.section import Section


class GuardConfig(Section):
    """Policy for NaN, Inf and spikes of loss and gradient norm."""

    on_spike: Literal["ignore", "skip", "rewind", "stop"] = "ignore"
    """What a spike of the loss or of the gradient norm leads to."""
