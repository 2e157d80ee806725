"""When and how much is evaluated."""

from __future__ import annotations

from pydantic import Field

from trainer.config.section import Section


class EarlyStoppingConfig(Section):
    """End the run once evaluations get no better. Null: it runs to its last step."""

    patience: int = Field(ge=1)
    """Evaluations in a row without improvement after which the run ends, as finished."""
    minimum_delta: float = Field(default=0.0, ge=0)
    """Nats per token by which the loss must fall to count as an improvement."""
    metric: str | None = None
    """Name of the source in ``data.validation`` whose loss counts; null: the mean over all."""


class EvaluationConfig(Section):
    """Evaluation of every validation source, also at step 0 and at the end."""

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between evaluations; null: at step 0 and at the end only."""
    batches: int | None = Field(default=None, ge=1)
    """Batches of ``batch.global_size`` sequences per source; null: the whole source."""
    early_stopping: EarlyStoppingConfig | None = None
    """End the run early. It asks for ``data.validation`` and ``evaluation.every_steps``."""
