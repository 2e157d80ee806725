"""Rules about ranks and the mesh."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config.deepspeed_rules import value_at
from trainer.config.derive import derive_problems
from trainer.config.model_fields import EXPERT_COUNTS, family_table
from trainer.core.errors import Problem
from trainer.models.tensor_plans import PLANS
from trainer.preflight.facts import Facts, Failing, Rule


def _expert(facts: Facts) -> Iterator[Problem]:
    """Each rank holds some of the experts of every block; the ranks are data-parallel ones."""
    parallel, model = facts.recipe.parallel, facts.model
    degree, key = parallel.expert, "parallel.expert"
    if degree == 1:
        return
    if facts.zero_stage == 3:
        rule = "ZeRO-3 shards experts already, which does not combine"
        yield Problem(key, degree, rule, "set deepspeed.base: zero2, or parallel.expert: 1 with ZeRO-3")
    if value_at(facts.deepspeed, "zero_optimization.offload_optimizer.device") not in (None, "none"):
        yield Problem(key, degree, "optimizer offload is not available with expert ranks", "set deepspeed.base: zero2")
    for axis in ("pipeline", "tensor", "sequence"):
        if getattr(parallel, axis) > 1:
            rule = f"expert ranks don't combine with parallel.{axis} = {getattr(parallel, axis)}"
            yield Problem(key, degree, rule, f"set parallel.{axis} to 1, or parallel.expert to 1")
    counts = [count for name in EXPERT_COUNTS if (count := model.number(name))]
    known = model.model_type in family_table()["families"]
    if known and not counts:
        yield Problem(key, degree, f"{model.model_type} has no experts", "set it to 1")
    for count in counts[:1]:
        if count % degree:
            divisors = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            yield Problem(key, degree, f"does not divide the model's {count} experts", f"use one of {divisors}")


def _tensor(facts: Facts) -> Iterator[Problem]:
    """Each tensor rank computes some of the heads and some of the columns of each layer."""
    parallel, model = facts.recipe.parallel, facts.model
    degree, key = parallel.tensor, "parallel.tensor"
    if degree == 1:
        return
    if facts.zero_stage == 3:
        rule = "ZeRO-3 shards what tensor ranks have divided already, which does not combine"
        yield Problem(key, degree, rule, "set deepspeed.base: zero2, or parallel.tensor: 1 with ZeRO-3")
    if value_at(facts.deepspeed, "zero_optimization.offload_optimizer.device") not in (None, "none"):
        yield Problem(key, degree, "optimizer offload is not available with tensor ranks", "set deepspeed.base: zero2")
    together = degree * parallel.sequence
    for field in ("num_attention_heads", "num_key_value_heads"):
        heads = model.number(field)
        share = together if field == "num_attention_heads" else degree  # fewer keys than sequence ranks are repeated
        if heads is not None and heads % share:
            product = f"{degree} x parallel.sequence = {share}" if share > degree else str(degree)
            divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            rule = f"{product} does not divide the model's {heads} {'heads' if share == together else 'key heads'}"
            yield Problem(key, degree, rule, f"use one of {divisors}")
    family = family_table()["families"].get(model.model_type)
    if family is not None and not family["tensor_plan"] and model.model_type not in PLANS:
        rule = f"transformers publishes no plan to divide the layers of {model.model_type}"
        yield Problem(key, degree, rule, "set it to 1, and parallel.pipeline or ZeRO-3 in its place")


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


def _router_losses(facts: Facts) -> Iterator[Problem]:
    if facts.model.get("output_router_logits") and facts.recipe.parallel.sequence > 1:
        rule = "the load-balancing loss of experts is one of whole sequences, which no rank has"
        fix = "set model.config.output_router_logits: false, or parallel.sequence to 1"
        yield Problem("model.config.output_router_logits", True, rule, fix)


def _sequence(facts: Facts) -> Iterator[Problem]:
    """Ulysses gives each rank whole sequences of some heads."""
    degree, recipe, model = facts.recipe.parallel.sequence, facts.recipe, facts.model
    if degree == 1:
        return
    key = "parallel.sequence"
    length, heads = recipe.data.sequence_length, model.number("num_attention_heads")
    if length % degree:
        below = length - length % degree
        fix = f"set data.sequence_length to {below or degree}, or parallel.sequence to a divisor of {length}"
        yield Problem(key, degree, f"does not divide data.sequence_length = {length}", fix)
    if heads is not None and heads % degree:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        yield Problem(key, degree, f"does not divide the model's {heads} attention heads", f"use one of {divisors}")
    if recipe.parallel.pipeline > 1:
        fix = "set parallel.pipeline: 1; with deepspeed.base: zero3 a large model fits too"
        yield Problem(key, degree, "sequence ranks and pipeline stages don't combine", fix)
    if recipe.model.attention != "sdpa":
        rule = f"the exchange between ranks has a core for sdpa, not for {recipe.model.attention}"
        yield Problem(key, degree, rule, "set model.attention: sdpa")
    family = family_table()["families"].get(model.model_type, {})
    if not family.get("attention_interface", True):
        rule = f"{model.model_type}'s attention does not go through transformers' interface"
        yield Problem(key, degree, rule, "set it to 1")
    others = sorted({str(kind) for kind in model.get("layer_types") or ()} - SEQUENCE_LAYER_TYPES)
    if others:
        rule = f"{model.model_type} has layers of {', '.join(others)}, which need whole sequences on every rank"
        yield Problem(key, degree, rule, "set it to 1")


def _tiles(facts: Facts) -> Iterator[Problem]:
    """What is computed at once is not computed in tiles."""
    recipe = facts.recipe
    held = recipe.data.sequence_length // recipe.parallel.sequence
    for name in ("tiled_loss", "tiled_mlp"):
        size = getattr(recipe.memory, name)
        if size is not None and size >= held:
            rule = f"is not less than the {held} tokens of a sequence that a rank holds"
            yield Problem(f"memory.{name}", size, rule, f"use {max(1, held // 8)} or so, or null")


def _inside_a_node(facts: Facts) -> Iterator[Problem]:
    """Tensor and sequence ranks exchange activations in every layer."""
    launch, parallel = facts.recipe.launch, facts.recipe.parallel
    if launch.launcher != "slurm":
        return
    per_node = launch.slurm.gpus_per_node or launch.processes
    for axis, together in (("tensor", parallel.tensor), ("sequence", parallel.tensor * parallel.sequence)):
        degree = getattr(parallel, axis)
        if degree > 1 and per_node % together:
            rule = f"its groups of {together} ranks would lie on several nodes of {per_node} ranks"
            yield Problem(f"parallel.{axis}", degree, rule, f"use a degree that divides {per_node}")


def _secondary_partition(facts: Facts) -> Iterator[Problem]:
    """ZeRO++ keeps a second copy of the parameters inside groups of ranks, which divide all ranks."""
    path = "zero_optimization.zero_hpz_partition_size"
    size = value_at(facts.deepspeed, path)
    if not isinstance(size, int) or size <= 1:
        return
    key = f"deepspeed.override.{path}"
    if facts.zero_stage != 3:
        yield Problem(
            key, size, f"is of ZeRO-3, not of ZeRO-{facts.zero_stage}", "set deepspeed.base: zero3, or remove it"
        )
    elif facts.world_size % size:
        yield Problem(key, size, f"does not divide the {facts.world_size} ranks", "use the number of ranks of a node")


def _quantized(facts: Facts) -> Iterator[Problem]:
    """ZeRO++ sends weights and gradients with fewer bits, by CUDA kernels."""
    launch = facts.recipe.launch
    for name in ("zero_quantized_weights", "zero_quantized_gradients"):
        path = f"zero_optimization.{name}"
        if value_at(facts.deepspeed, path) is not True:
            continue
        if facts.zero_stage != 3:
            rule = f"is of ZeRO-3, not of ZeRO-{facts.zero_stage}"
            yield Problem(f"deepspeed.override.{path}", True, rule, "set deepspeed.base: zero3, or remove it")
        elif launch.launcher == "slurm" and launch.slurm.gpus_per_node == 0:
            yield Problem(f"deepspeed.override.{path}", True, "needs CUDA, and the run is on CPUs", "remove it")


def _frozen_on_nvme(facts: Facts) -> Iterator[Problem]:
    path, patterns = "zero_optimization.offload_param.device", list(facts.recipe.model.freeze)
    if patterns and value_at(facts.deepspeed, path) == "nvme":
        rule = "frozen parameters can't be read back from NVMe when a checkpoint is saved"
        yield Problem("model.freeze", patterns, rule, f"set deepspeed.override.{path}: cpu, or freeze nothing")


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

SEQUENCE_LAYER_TYPES = {"full_attention", "sliding_attention"}

_MIXTRAL = {"parallel.expert": 2, "model.config": {"model_type": "mixtral"}}

RULES = (
    Rule("experts to spread", _expert, Failing({"parallel.expert": 2})),
    Rule(
        "experts divisible by expert ranks",
        _expert,
        Failing(
            {"parallel.expert": 3, "batch.global_size": 12, "model.config": {"model_type": "mixtral"}}, world_size=3
        ),
    ),
    Rule("expert ranks without ZeRO-3", _expert, Failing(_MIXTRAL | {"deepspeed.base": "zero3"})),
    Rule(
        "expert ranks without offload",
        _expert,
        Failing(_MIXTRAL | {"deepspeed.override": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}),
    ),
    Rule("expert ranks alone", _expert, Failing(_MIXTRAL | {"parallel.tensor": 2}, world_size=4)),
    Rule("tensor ranks without ZeRO-3", _tensor, Failing({"parallel.tensor": 2, "deepspeed.base": "zero3"})),
    Rule(
        "tensor ranks without offload",
        _tensor,
        Failing(
            {
                "parallel.tensor": 2,
                "deepspeed.override": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            }
        ),
    ),
    Rule("heads divisible by tensor ranks", _tensor, Failing({"parallel.tensor": 8}, world_size=8)),
    Rule(
        "key heads divisible by tensor ranks",
        _tensor,
        Failing({"parallel.tensor": 2, "model.config.num_key_value_heads": 1}),
    ),
    Rule(
        "families with a tensor plan", _tensor, Failing({"parallel.tensor": 2, "model.config": {"model_type": "opt"}})
    ),
    Rule(
        "tensor ranks inside a node",
        _inside_a_node,
        Failing({"parallel.tensor": 2, "launch.launcher": "slurm", "launch.slurm": {"nodes": 2, "gpus_per_node": 1}}),
    ),
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
    Rule(
        "load-balancing loss of whole sequences",
        _router_losses,
        Failing(
            {"parallel.sequence": 2, "model.config": {"model_type": "mixtral", "output_router_logits": True}},
        ),
    ),
    Rule("sequence length divisible", _sequence, Failing({"parallel.sequence": 2, "data.sequence_length": 33})),
    Rule("heads divisible by sequence ranks", _sequence, Failing({"parallel.sequence": 8}, world_size=8)),
    Rule(
        "sequence ranks without stages",
        _sequence,
        Failing({"parallel.sequence": 2, "parallel.pipeline": 2}, world_size=4),
    ),
    Rule("sequence ranks and attention", _sequence, Failing({"parallel.sequence": 2, "model.attention": "eager"})),
    Rule(
        "sequence ranks and families",
        _sequence,
        Failing({"parallel.sequence": 2, "model.config": {"model_type": "bloom"}}),
    ),
    Rule(
        "sequence ranks and layers",
        _sequence,
        Failing(
            {
                "parallel.sequence": 2,
                "model.config": {"model_type": "qwen3_next", "layer_types": ["linear_attention"] * 48},
            }
        ),
    ),
    Rule("tiles of the loss are parts", _tiles, Failing({"memory.tiled_loss": 16})),
    Rule("tiles of the MLP are parts", _tiles, Failing({"parallel.sequence": 2, "memory.tiled_mlp": 8})),
    Rule(
        "sequence ranks inside a node",
        _inside_a_node,
        Failing({"parallel.sequence": 2, "launch.launcher": "slurm", "launch.slurm": {"nodes": 2, "gpus_per_node": 1}}),
    ),
    Rule(
        "secondary partition of ZeRO-3",
        _secondary_partition,
        Failing({"deepspeed.override": {"zero_optimization": {"zero_hpz_partition_size": 2}}}),
    ),
    Rule(
        "secondary partition divides the ranks",
        _secondary_partition,
        Failing(
            {
                "deepspeed.base": "zero3",
                "deepspeed.override": {"zero_optimization": {"zero_hpz_partition_size": 3}},
            }
        ),
    ),
    Rule(
        "quantized communication of ZeRO-3",
        _quantized,
        Failing({"deepspeed.override": {"zero_optimization": {"zero_quantized_gradients": True}}}),
    ),
    Rule(
        "quantized communication on GPUs",
        _quantized,
        Failing(
            {
                "deepspeed.base": "zero3",
                "deepspeed.override": {"zero_optimization": {"zero_quantized_weights": True}},
                "launch.launcher": "slurm",
                "launch.slurm": {"nodes": 1, "gpus_per_node": 0},
            }
        ),
    ),
    Rule(
        "frozen parameters and NVMe",
        _frozen_on_nvme,
        Failing({"deepspeed.base": "zero3_offload_nvme", "model.freeze": ["embed"]}),
    ),
    Rule("world size divisible by the mesh", _divisible, Failing({"parallel.pipeline": 2}, world_size=3)),
    Rule("batch triangle", _batch, Failing({"batch.global_size": 7})),
    Rule(
        "batch triangle of every size of a warm-up",
        _batch,
        Failing({"batch.global_size": 8, "batch.warmup": {"start_size": 2, "increment": 3, "steps": 2}}),
    ),
    Rule("at least one rank", _batch, Failing(world_size=0)),
)
