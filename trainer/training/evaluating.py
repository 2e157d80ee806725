"""When the loop evaluates, and whether an evaluation ends it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from trainer.core import faults
from trainer.evaluation.best import metric_loss, metric_name, stopping_reason

if TYPE_CHECKING:
    from trainer.training.loop import Parts


def is_due(step: int, every: int | None) -> bool:
    """Return whether something done every so many steps is due after ``step``."""
    return every is not None and step > 0 and step % every == 0


def early_end(parts: Parts) -> str | None:
    """Return why the run ends before its last step, None: it does not."""
    if parts.state.step >= parts.derived.total_steps:
        return None
    return stopping_reason(parts.recipe, parts.state.best)


def evaluate_if_due(parts: Parts) -> bool:
    """Evaluate at step 0, every so many steps and after the last one; never twice at the same step.

    Return whether it was done and is the best so far.
    """
    step, state = parts.state.step, parts.state
    due = step in (0, parts.derived.total_steps) or is_due(step, parts.recipe.evaluation.every_steps)
    if not due or state.evaluated_step == step:
        return False
    faults.reach("train.evaluation", rank=parts.rank, step=step)
    records = parts.validation.run(parts.engine, step)
    state.evaluated_step = step
    if not records:
        return False
    loss = metric_loss(parts.recipe, [(record.name, record.validation_loss) for record in records])
    stopping = parts.recipe.evaluation.early_stopping
    best = state.best.note(metric_name(parts.recipe), step, loss, stopping.minimum_delta if stopping else 0.0)
    records[-1] = replace(records[-1], best_validation_loss=state.best.loss, best_step=state.best.step)
    for record in records:
        parts.sinks.evaluation(record)
    return best
