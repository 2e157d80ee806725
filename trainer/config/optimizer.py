"""The optimizer and the learning-rate schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.section import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW or SGD, as torch implements them."""

    name: Literal["adamw", "sgd"] = "adamw"
    """Name in trainer/optim/table.py."""
    learning_rate: float = Field(default=3.0e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of AdamW's first and second moment, each in [0, 1)."""
    epsilon: float = Field(default=1.0e-8, gt=0)
    """AdamW's denominator term."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """SGD's momentum."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decay of matrices (decoupled with AdamW, in the gradient with SGD); biases and norms are never decayed."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Global gradient norm to clip at; 0 switches clipping off."""


class ScheduleConfig(Section):
    """Multiplier of the learning rate, a pure function of the step."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up from 0."""
    minimum_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the last step, as a share of the peak."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Step at which the minimum is reached. Null: the last step of the run. Set it to extend runs safely."""
