"""The optimizer and the learning-rate schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.section import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class ParameterGroupConfig(Section):
    """Parameters that are trained differently."""

    pattern: str
    """Regular expression, searched in the Hugging Face name; the first group that matches counts."""
    learning_rate_ratio: float = Field(default=1.0, gt=0)
    """Learning rate as a share of the schedule's."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Null: as elsewhere, ``optimizer.weight_decay`` for matrices and 0 for biases and norms."""


class OptimizerConfig(Section):
    """How weights follow gradients. State is float32 whatever the compute dtype."""

    name: Literal["adamw", "sgd", "lion", "adagrad", "muon"] = "adamw"
    """Name in trainer/optim/table.py. ``muon``: for the matrices of blocks, AdamW for the rest."""
    learning_rate: float = Field(default=3.0e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of AdamW's first and second moment, each in [0, 1), also beside Muon; of Lion's step and momentum."""
    epsilon: float = Field(default=1.0e-8, gt=0)
    """Denominator term of AdamW and Adagrad."""
    momentum: float | None = Field(default=None, ge=0, lt=1)
    """Of SGD (null: 0) and Muon (null: 0.95)."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decay of matrices, not of biases and norms; decoupled with AdamW, Lion and Muon, else in the gradient."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Global gradient norm to clip at; 0 switches clipping off."""
    groups: tuple[ParameterGroupConfig, ...] = ()
    """Exceptions, e.g. ``{pattern: embed, learning_rate_ratio: 0.1}``."""

    @property
    def chosen_momentum(self) -> float:
        """``momentum``, or the optimizer's default."""
        if self.momentum is not None:
            return self.momentum
        return 0.95 if self.name == "muon" else 0.0


class ScheduleConfig(Section):
    """Multiplier of the learning rate, a pure function of the step."""

    name: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"] = "cosine"
    """Shape after the warm-up. ``wsd`` stays at the peak and decays linearly at the end (warm-up, stable, decay)."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up from 0."""
    minimum_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the last step, as a share of the peak."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Step at which the minimum is reached. Null: the last step of the run. Set it to extend runs safely."""
    decay_ratio: float = Field(default=0.1, gt=0, le=1)
    """Share of the steps up to the minimum that ``wsd`` decays over."""
