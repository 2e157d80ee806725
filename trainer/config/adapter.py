"""Parameter-efficient fine-tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.config.section import Section


class AdapterConfig(Section):
    """Train a small adapter instead of the whole model."""

    method: Literal["lora"] = "lora"
    """Adapter family."""
    rank: int = Field(default=16, ge=1)
    """Inner dimension."""
    alpha: float = Field(default=32, gt=0)
    """Scale numerator."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    targets: str | tuple[str, ...] = "auto"
    """Module names, or auto."""
