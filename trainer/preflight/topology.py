"""Rules about ranks and the mesh."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config.deepspeed_rules import value_at
from trainer.config.derive import derive_problems
from trainer.core.errors import Problem
from trainer.preflight.facts import NOT_AVAILABLE, Facts, Failing, Rule


def _degrees(facts: Facts) -> Iterator[Problem]:
    for axis in ("tensor", "sequence", "expert"):
        degree = getattr(facts.recipe.parallel, axis)
        if degree > 1:
            yield Problem(f"parallel.{axis}", degree, f"{axis} parallelism {NOT_AVAILABLE}", "set it to 1")


def _stages(facts: Facts) -> Iterator[Problem]:
    stages, layers = facts.recipe.parallel.pipeline, facts.model.number("num_hidden_layers")
    if layers is not None and stages > layers:
        rule = f"the model has {layers} blocks, and every stage needs one"
        yield Problem("parallel.pipeline", stages, rule, f"use at most {layers}")


def _stages_and_zero(facts: Facts) -> Iterator[Problem]:
    """DeepSpeed's pipeline engine sums gradients over micro-batches in full."""
    if facts.recipe.parallel.pipeline == 1:
        return
    if facts.zero_stage > 1:
        rule = f"ZeRO-{facts.zero_stage} shards gradients, which DeepSpeed's pipeline engine keeps whole"
        fix = f"set deepspeed.base: zero1, or parallel.pipeline: 1 with ZeRO-{facts.zero_stage}"
        yield Problem("parallel.pipeline", facts.recipe.parallel.pipeline, rule, fix)
    elif value_at(facts.deepspeed, "zero_optimization.offload_optimizer.device") not in (None, "none"):
        rule = "optimizer offload is not available with pipeline stages"
        yield Problem("parallel.pipeline", facts.recipe.parallel.pipeline, rule, "set deepspeed.base: zero1")


def _family_in_stages(facts: Facts) -> Iterator[Problem]:
    if facts.recipe.parallel.pipeline == 1:
        return
    for field, what in UNCUTTABLE.items():
        value = facts.model.get(field)
        if value:
            rule = f"{facts.model.model_type} {what} ({field} = {value}): it can't be cut into stages"
            yield Problem("parallel.pipeline", facts.recipe.parallel.pipeline, rule, "set it to 1")


def _divisible(facts: Facts) -> Iterator[Problem]:
    yield from (problem for problem in derive_problems(facts.recipe, facts.world_size) if problem.key == "parallel")


def _batch(facts: Facts) -> Iterator[Problem]:
    yield from (problem for problem in derive_problems(facts.recipe, facts.world_size) if problem.key != "parallel")


# Fields of a Hugging Face config that mean more than hidden states must go from block to block.
UNCUTTABLE = {
    "is_encoder_decoder": "has an encoder beside its decoder",
    "num_kv_shared_layers": "shares keys and values between layers",
    "hidden_size_per_layer_input": "has an embedding for every layer",
}

RULES = (
    Rule("parallel degrees available", _degrees, Failing({"parallel.tensor": 2})),
    Rule("every stage has a block", _stages, Failing({"parallel.pipeline": 4}, world_size=4)),
    Rule("stages with ZeRO 0 or 1", _stages_and_zero, Failing({"parallel.pipeline": 2, "deepspeed.base": "zero2"})),
    Rule(
        "stages without optimizer offload",
        _stages_and_zero,
        Failing(
            {
                "parallel.pipeline": 2,
                "deepspeed.base": "zero1",
                "deepspeed.override": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            }
        ),
    ),
    Rule(
        "families that can be cut",
        _family_in_stages,
        Failing({"parallel.pipeline": 2, "model.config": {"model_type": "gemma3n_text"}}),
    ),
    Rule("world size divisible by the mesh", _divisible, Failing({"parallel.pipeline": 2}, world_size=3)),
    Rule("batch triangle", _batch, Failing({"batch.global_size": 7})),
    Rule("at least one rank", _batch, Failing(world_size=0)),
)
