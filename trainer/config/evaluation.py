"""When and how much is evaluated."""

from __future__ import annotations

from pydantic import Field

from trainer.config.section import Section


class EvaluationConfig(Section):
    """Evaluation of every validation source, also at step 0 and at the end."""

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between evaluations; null: at step 0 and at the end only."""
    batches: int | None = Field(default=None, ge=1)
    """Batches of ``batch.global_size`` sequences per source; null: the whole source."""
    early_stopping: None = None
    """Not available yet."""
