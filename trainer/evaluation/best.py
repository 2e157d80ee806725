"""Which evaluation was the best, and when to stop because none gets better: pure counting, torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer.config.run import Recipe


@dataclass
class BestEvaluation:
    """The best evaluation so far; part of the training state, the same on every rank."""

    name: str = ""
    """What is compared: a validation source, or "mean of a, b"."""
    loss: float | None = None
    """Lowest loss, in nats per token; None: nothing was evaluated yet."""
    step: int = -1
    """Step of the lowest loss."""
    counted_loss: float | None = None
    """Loss of the last evaluation that counted as an improvement (``minimum_delta``)."""
    without_improvement: int = 0
    """Evaluations in a row since then."""

    def note(self, name: str, step: int, loss: float, minimum_delta: float) -> bool:
        """Count one evaluation and return whether it is the best so far. NaN and Inf are no improvement.

        Losses of another ``name`` can't be compared with: the first one of a name is its best.
        """
        self.begin(name)
        known = math.isfinite(loss)
        if known and (self.counted_loss is None or loss < self.counted_loss - minimum_delta):
            self.counted_loss = loss
            self.without_improvement = 0
        else:
            self.without_improvement += 1
        if not known or (self.loss is not None and loss >= self.loss):
            return False
        self.loss, self.step = loss, step
        return True

    def begin(self, name: str) -> None:
        """Forget what was counted of another metric."""
        if name != self.name:
            self.name, self.loss, self.step, self.counted_loss, self.without_improvement = name, None, -1, None, 0

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BestEvaluation | None:
        """Return the fields that a checkpoint holds, defaults for those it lacks, None where they make no sense."""
        found = cls(**{key: values[key] for key in asdict(cls()) if key in values})
        losses = (found.loss, found.counted_loss)
        sound = isinstance(found.name, str) and all(type(n) is int for n in (found.step, found.without_improvement))
        return found if sound and all(loss is None or type(loss) in (int, float) for loss in losses) else None


def metric_name(recipe: Recipe) -> str:
    """Return what evaluations are compared by; another name is another metric. Empty: nothing is evaluated."""
    stopping = recipe.evaluation.early_stopping
    names = [source.name for source in recipe.data.validation]
    if stopping is not None and stopping.metric is not None:
        return stopping.metric
    return names[0] if len(names) == 1 else f"mean of {', '.join(names)}" if names else ""


def metric_loss(recipe: Recipe, losses: Sequence[tuple[str, float]]) -> float:
    """Return the loss that counts of one evaluation's (name, loss) in nats per token."""
    stopping = recipe.evaluation.early_stopping
    metric = stopping.metric if stopping is not None else None
    counted = [loss for name, loss in losses if metric in (None, name)]
    return sum(counted) / len(counted) if counted else math.nan


def stopping_reason(recipe: Recipe, best: BestEvaluation) -> str | None:
    """Return why the run ends before its last step, None: it goes on."""
    stopping = recipe.evaluation.early_stopping
    if stopping is None or best.name != metric_name(recipe) or best.without_improvement < stopping.patience:
        return None
    known = f"; best {best.loss:.4f} at step {best.step}" if best.loss is not None else ""
    return f"early stopping: no improvement of {best.name} in {best.without_improvement} evaluations{known}"
