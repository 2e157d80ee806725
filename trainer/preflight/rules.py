"""Every rule, in the order problems are shown."""

from __future__ import annotations

from trainer.preflight import checkpoint, data, environment, evaluation, launch, model, optimizer, ownership, topology
from trainer.preflight.facts import Rule

RULES: tuple[Rule, ...] = (
    *topology.RULES,
    *model.RULES,
    *data.RULES,
    *optimizer.RULES,
    *evaluation.RULES,
    *checkpoint.RULES,
    *ownership.RULES,
    *launch.RULES,
    *environment.RULES,
)
