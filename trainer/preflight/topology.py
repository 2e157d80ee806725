"""Rules about ranks and the mesh."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config.derive import derive_problems
from trainer.core.errors import Problem
from trainer.preflight.facts import NOT_AVAILABLE, Facts, Failing, Rule


def _degrees(facts: Facts) -> Iterator[Problem]:
    for axis in ("pipeline", "tensor", "sequence", "expert"):
        degree = getattr(facts.recipe.parallel, axis)
        if degree > 1:
            yield Problem(f"parallel.{axis}", degree, f"{axis} parallelism {NOT_AVAILABLE}", "set it to 1")


def _divisible(facts: Facts) -> Iterator[Problem]:
    yield from (problem for problem in derive_problems(facts.recipe, facts.world_size) if problem.key == "parallel")


def _batch(facts: Facts) -> Iterator[Problem]:
    yield from (problem for problem in derive_problems(facts.recipe, facts.world_size) if problem.key != "parallel")


RULES = (
    Rule("parallel degrees available", _degrees, Failing({"parallel.tensor": 2})),
    Rule("world size divisible by the mesh", _divisible, Failing({"parallel.pipeline": 2}, world_size=3)),
    Rule("batch triangle", _batch, Failing({"batch.global_size": 7})),
    Rule("at least one rank", _batch, Failing(world_size=0)),
)
