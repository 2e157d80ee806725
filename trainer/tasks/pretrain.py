"""Pre-training: every token of every document is a target."""

from __future__ import annotations

from trainer.models.loss import LossSpec, cross_entropy_by_row


def loss_spec() -> LossSpec:
    """Return next-token cross-entropy."""
    return LossSpec("next_token", cross_entropy_by_row)
