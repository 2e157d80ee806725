"""Pre-training: every token of every document is a target."""

from __future__ import annotations

from trainer.models.loss import LossSpec, cross_entropy_by_row


def loss_spec(vocabulary_size: int | None = None) -> LossSpec:
    """Return next-token cross-entropy over the first ``vocabulary_size`` logits; None: over all.

    What pads a vocabulary gets no probability: a model without the padding computes the same loss.
    """
    if vocabulary_size is None:
        return LossSpec("next_token", cross_entropy_by_row)
    return LossSpec("next_token", lambda logits, targets: cross_entropy_by_row(logits[..., :vocabulary_size], targets))
