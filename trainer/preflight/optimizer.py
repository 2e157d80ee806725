"""Rules about the learning-rate schedule, the warm-up of the batch and the length of the run."""

from __future__ import annotations

import re
from collections.abc import Iterator

from trainer.config.deepspeed_rules import value_at
from trainer.core.errors import Problem
from trainer.preflight.facts import Facts, Failing, Rule


def _warmup(facts: Facts) -> Iterator[Problem]:
    warmup = facts.recipe.schedule.warmup_steps
    if facts.derived is not None and warmup > facts.derived.total_steps:
        total = facts.derived.total_steps
        rule = f"the warm-up is longer than the run of {total} steps"
        yield Problem("schedule.warmup_steps", warmup, rule, f"use at most {total}")


def _batch_warmup(facts: Facts) -> Iterator[Problem]:
    warmup = facts.recipe.batch.warmup
    if warmup is not None and facts.derived is not None and warmup.steps >= facts.derived.total_steps:
        rule = f"the run of {facts.derived.total_steps} steps ends before the batch reaches batch.global_size"
        yield Problem("batch.warmup.steps", warmup.steps, rule, "use fewer, or a longer run")


def _decay(facts: Facts) -> Iterator[Problem]:
    schedule = facts.recipe.schedule
    if schedule.decay_steps is not None and schedule.decay_steps < schedule.warmup_steps:
        rule = f"the decay ends before the warm-up of {schedule.warmup_steps} steps does"
        yield Problem("schedule.decay_steps", schedule.decay_steps, rule, "use at least schedule.warmup_steps")


def _momentum(facts: Facts) -> Iterator[Problem]:
    optimizer = facts.recipe.optimizer
    if optimizer.name not in ("sgd", "muon") and optimizer.momentum:
        rule = f"momentum is of SGD and Muon; {optimizer.name} has its own settings"
        yield Problem("optimizer.momentum", optimizer.momentum, rule, "remove it or set optimizer.name: sgd or muon")


def _muon(facts: Facts) -> Iterator[Problem]:
    """Muon's step of a matrix needs all of it, on the device that computes it."""
    parallel = facts.recipe.parallel
    if facts.recipe.optimizer.name != "muon":
        return
    for axis in ("tensor", "expert"):
        degree = getattr(parallel, axis)
        if degree > 1:
            rule = f"needs whole matrices, which parallel.{axis} = {degree} divides"
            fix = f"set parallel.{axis}: 1 (ZeRO and pipeline stages work), or optimizer.name: adamw"
            yield Problem("optimizer.name", "muon", rule, fix)
    if value_at(facts.deepspeed, "zero_optimization.offload_optimizer.device") not in (None, "none"):
        rule = "multiplies matrices in its step, and optimizer offload leaves them to the CPU"
        yield Problem("optimizer.name", "muon", rule, "remove offload_optimizer, or set optimizer.name: adamw")


def _groups(facts: Facts) -> Iterator[Problem]:
    for index, group in enumerate(facts.recipe.optimizer.groups):
        try:
            re.compile(group.pattern)
        except re.error as error:
            key = f"optimizer.groups.{index}.pattern"
            yield Problem(key, group.pattern, f"is no regular expression: {error}", "correct it")


def _inverse_sqrt(facts: Facts) -> Iterator[Problem]:
    schedule = facts.recipe.schedule
    if schedule.name == "inverse_sqrt" and schedule.warmup_steps == 0:
        rule = "inverse_sqrt is sqrt(warmup_steps / step): without a warm-up it falls to a tenth in 100 steps"
        yield Problem("schedule.warmup_steps", 0, rule, "use a warm-up, or another schedule")


RULES = (
    Rule("parameter groups", _groups, Failing({"optimizer.groups": [{"pattern": "layers.(0"}]})),
    Rule("inverse square root after a warm-up", _inverse_sqrt, Failing({"schedule.name": "inverse_sqrt"})),
    Rule("warm-up within the run", _warmup, Failing({"schedule.warmup_steps": 9})),
    Rule(
        "batch warm-up within the run",
        _batch_warmup,
        Failing({"batch.global_size": 4, "batch.warmup": {"start_size": 2, "increment": 2, "steps": 4}}),
    ),
    Rule("decay after the warm-up", _decay, Failing({"schedule.warmup_steps": 2, "schedule.decay_steps": 1})),
    Rule("momentum only with SGD and Muon", _momentum, Failing({"optimizer.momentum": 0.9})),
    Rule("Muon and tensor ranks", _muon, Failing({"optimizer.name": "muon", "parallel.tensor": 2})),
    Rule(
        "Muon and offload",
        _muon,
        Failing(
            {
                "optimizer.name": "muon",
                "deepspeed.override": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            }
        ),
    ),
)
