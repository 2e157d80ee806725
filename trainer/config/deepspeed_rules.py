"""What in a DeepSpeed JSON would work against the recipe or the trainer. Rules are data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from trainer.config.deepspeed_file import DeepSpeedFile
from trainer.config.run import Recipe
from trainer.core.errors import Problem

NOT_AVAILABLE = "is not available in this version"


@dataclass(frozen=True)
class Refused:
    """A value that is refused wherever ``when`` is true of it."""

    path: str
    when: Callable[[Any], bool]
    rule: str
    fix: str


def _on(value: Any) -> bool:
    return value not in (None, False, 0, "auto")


def _off(value: Any) -> bool:
    return value is False


def _above_one(value: Any) -> bool:
    return isinstance(value, int | float) and value > 1


def _device(value: Any) -> bool:
    return value not in (None, "none", "auto")


def _section(value: Any) -> bool:
    return value not in (None, False)


REFUSED: tuple[Refused, ...] = (
    Refused("fp16.enabled", _on, "float16 is not supported", "use model.dtype: bfloat16 or float32 and remove fp16"),
    Refused("torch_autocast.enabled", _on, "the compute dtype comes from model.dtype", "remove torch_autocast"),
    Refused("bf16.bf16_master_weights_and_grads", _on, "master weights and gradients stay float32", "remove it"),
    Refused("bf16.bf16_optimizer_states", _on, "optimizer state stays float32", "remove it"),
    Refused(
        "zero_optimization.elastic_checkpoint",
        _on,
        "checkpoints are written by the trainer and load at any number of ranks",
        "remove it",
    ),
    Refused("zero_optimization.cpu_offload_param", _on, f"offload_param {NOT_AVAILABLE}", "remove it"),
    Refused("zero_optimization.offload_optimizer.super_offload", _on, NOT_AVAILABLE, "remove it"),
    Refused(
        "zero_optimization.round_robin_gradients",
        _on,
        "DeepSpeed then loses track of which weight lies where, and checkpoints would hold them under wrong names",
        "remove it",
    ),
    Refused("zero_optimization.zenflow", _section, NOT_AVAILABLE, "remove it"),
    Refused(
        "zero_optimization.zero_quantized_nontrainable_weights",
        _on,
        "frozen weights would be saved with 8 bits",
        "remove it; zero_quantized_weights sends, but does not keep, 8 bits",
    ),
    Refused(
        "zero_optimization.compute_grad_norm", _off, "the gradient norm is needed to refuse a bad step", "remove it"
    ),
    Refused("gradient_allreduce_op", lambda value: value == "sum", "gradients are averaged over ranks", "remove it"),
    Refused("managed_gradient_accumulation", _off, "accumulation is derived from batch.*", "remove it"),
    Refused(
        "data_efficiency.enabled", _on, "data come from data.* in an order that depends on run.seed only", "remove it"
    ),
    Refused("autotuning.enabled", _on, "a tuner may not change the recipe", "remove autotuning"),
    Refused("tensorboard.enabled", _on, "the trainer writes its own", "remove it and set telemetry.tensorboard: true"),
    Refused("wandb.enabled", _on, "the trainer reports by itself", "remove it and see telemetry.wandb"),
    Refused("csv_monitor.enabled", _on, "the trainer writes metrics.jsonl", "remove it and see telemetry.*"),
    Refused("comet.enabled", _on, "the trainer reports by itself", "remove it and see telemetry.*"),
    Refused("hybrid_engine.enabled", _on, NOT_AVAILABLE, "remove hybrid_engine"),
    Refused("compile.deepcompile", _on, NOT_AVAILABLE, "remove it; see kernels.compile"),
    Refused("expert_parallel.enabled", _on, "the trainer spreads experts itself", "remove it and set parallel.expert"),
    Refused(
        "tensor_parallel.autotp_size",
        _above_one,
        "the trainer divides layers itself",
        "remove it and set parallel.tensor",
    ),
    Refused("weight_quantization", _section, NOT_AVAILABLE, "remove it"),
    Refused("datastates_ckpt", _section, "checkpoints are written by the trainer", "remove it; see checkpoint.*"),
    Refused("checkpoint.load_universal", _on, "checkpoints load at any shape without conversion", "remove it"),
)

FP32 = ("fp32", "float32", "float", "torch.float32", "auto", None)
OPTIMIZER_TYPES = {name: (name,) for name in ("sgd", "lion", "adagrad", "muon")} | {"adamw": ("adamw", "adam")}
COMPRESSED = ("onebitadam", "zerooneadam", "onebitlamb")
# Say how the update is computed, not what it is: without effect, because the trainer brings its own optimizer.
IMPLEMENTATION_PARAMS = {"torch_adam", "fused", "foreach", "capturable", "set_grad_none", "differentiable"}
DEFAULT_PARAMS: dict[str, Any] = {
    "adam_w_mode": True,
    "adamw_mode": True,
    "bias_correction": True,
    "fp32_optimizer_states": True,
}


def value_at(values: Any, path: str) -> Any:
    """Return the value at a dotted path, or None."""
    for part in path.split("."):
        if not isinstance(values, Mapping):
            return None
        values = cast("Mapping[str, Any]", values).get(part)
    return values


def refused_problems(file: DeepSpeedFile) -> Iterator[Problem]:
    """Yield every value that fights the trainer."""
    for rule in REFUSED:
        value = value_at(file.values, rule.path)
        if rule.when(value):
            shown = None if isinstance(value, dict) else value
            yield Problem(file.key(rule.path), shown, rule.rule, rule.fix)
    yield from _stage_problems(file)
    accumulation = value_at(file.values, "data_types.grad_accum_dtype")
    if accumulation not in FP32:
        rule_text = "gradients must be summed in fp32; lower precision is not numerically safe"
        yield Problem(file.key("data_types.grad_accum_dtype"), accumulation, rule_text, "set it to fp32 or auto")
    communication = file.values.get("communication_data_type")
    if communication not in (None, "auto", "fp32", "bf16"):
        fix = "set it to auto, fp32 or bf16"
        yield Problem(file.key("communication_data_type"), communication, "must be fp32 or bf16", fix)
    checkpointing = file.values.get("activation_checkpointing")
    if isinstance(checkpointing, Mapping) and any(_on(v) for v in cast("Mapping[str, Any]", checkpointing).values()):
        rule_text = "has no effect on Hugging Face models"
        fix = "remove it and set memory.activation_checkpointing: full"
        yield Problem(file.key("activation_checkpointing"), None, rule_text, fix)


def _stage_problems(file: DeepSpeedFile) -> Iterator[Problem]:
    zero = file.values.get("zero_optimization", {})
    stage = cast("Mapping[str, Any]", zero).get("stage", 0) if isinstance(zero, Mapping) else 0
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        fix = "name a stage: it is a choice, not derived" if stage == "auto" else "use 0, 1, 2 or 3"
        yield Problem(file.key("zero_optimization.stage"), stage, "must be 0, 1, 2 or 3", fix)
        return
    device = value_at(file.values, "zero_optimization.offload_optimizer.device")
    if stage == 0 and _device(device):
        path = "zero_optimization.offload_optimizer.device"
        yield Problem(file.key(path), device, "optimizer offload needs ZeRO stage 1, 2 or 3", "raise the stage")
    for section in ("offload_optimizer", "offload_param"):
        path = f"zero_optimization.{section}.device"
        if value_at(file.values, path) == "nvme" and stage != 3:
            yield Problem(file.key(path), "nvme", "NVMe needs ZeRO stage 3", "set deepspeed.base: zero3_offload_nvme")
    ratio = value_at(file.values, "zero_optimization.offload_optimizer.ratio")
    if isinstance(ratio, int | float) and ratio < 1 and stage != 3:
        path = "zero_optimization.offload_optimizer.ratio"
        yield Problem(file.key(path), ratio, "partial offload needs ZeRO stage 3", "remove it")


def optimizer_problems(file: DeepSpeedFile, recipe: Recipe) -> Iterator[Problem]:
    """Yield where an ``optimizer`` or ``scheduler`` section says something else than the recipe."""
    section = file.values.get("optimizer")
    if isinstance(section, Mapping):
        yield from _optimizer_problems(cast("Mapping[str, Any]", section), file, recipe)
    scheduler = file.values.get("scheduler")
    params = cast("Any", scheduler).get("params") if isinstance(scheduler, Mapping) else None
    given: Mapping[str, Any] = cast("Mapping[str, Any]", params) if isinstance(params, Mapping) else {}
    if any(value != "auto" for value in given.values()):
        fix = f"remove it; the schedule is schedule.name = {recipe.schedule.name} and schedule.*"
        yield Problem(file.key("scheduler"), None, "the learning-rate schedule comes from the recipe", fix)


def _optimizer_problems(section: Mapping[str, Any], file: DeepSpeedFile, recipe: Recipe) -> Iterator[Problem]:
    optimizer = recipe.optimizer
    kind = section.get("type", "auto")
    if str(kind).lower() in COMPRESSED:
        rule = (
            "sums compressed gradients: there is no norm to clip by or to refuse a step for, and what it remembers "
            "belongs to one rank of one number of ranks"
        )
        fix = "use optimizer.name: adamw; communication_data_type: bf16 halves what is sent"
        yield Problem(file.key("optimizer.type"), kind, rule, fix)
    elif kind != "auto" and str(kind).lower() not in OPTIMIZER_TYPES[optimizer.name]:
        rule = f"disagrees with optimizer.name = {optimizer.name}"
        yield Problem(file.key("optimizer.type"), kind, rule, "remove the optimizer section or change optimizer.name")
    agreed: dict[str, tuple[str, Any]] = {
        "lr": ("optimizer.learning_rate", optimizer.learning_rate),
        "weight_decay": ("optimizer.weight_decay", optimizer.weight_decay),
        "max_grad_norm": ("optimizer.clip_norm", optimizer.clip_norm),
    }
    if optimizer.name in ("adamw", "lion", "muon"):
        agreed["betas"] = ("optimizer.betas", list(optimizer.betas))
    if optimizer.name in ("adamw", "adagrad", "muon"):
        agreed["eps"] = ("optimizer.epsilon", optimizer.epsilon)
    if optimizer.name in ("sgd", "muon"):
        agreed["momentum"] = ("optimizer.momentum", optimizer.chosen_momentum)
    params = section.get("params")
    for name, value in cast("Mapping[str, Any]", params).items() if isinstance(params, Mapping) else ():
        path = f"optimizer.params.{name}"
        if value == "auto" or name in IMPLEMENTATION_PARAMS:
            continue
        if name in agreed:
            key, wanted = agreed[name]
            if not same(value, wanted):
                yield Problem(
                    file.key(path), value, f"disagrees with {key} = {wanted}", 'set it to "auto" or remove it'
                )
        elif value is not None and value != DEFAULT_PARAMS.get(name, False):
            rule = f"is not a setting of the recipe's optimizer ({optimizer.name})"
            yield Problem(file.key(path), value, rule, "remove it")


def same(found: Any, wanted: Any) -> bool:
    """Return whether a JSON value says what the recipe says; 1 and true are different, 1 and 1.0 are not."""
    if isinstance(wanted, bool) or isinstance(found, bool):
        return found is wanted
    if isinstance(wanted, list):
        if not isinstance(found, list):
            return False
        pairs = list(zip(cast("list[Any]", found), cast("list[Any]", wanted), strict=False))
        return len(cast("list[Any]", found)) == len(cast("list[Any]", wanted)) and all(same(a, b) for a, b in pairs)
    if isinstance(wanted, int | float) and isinstance(found, int | float):
        return abs(found - wanted) <= 1e-9 * max(abs(found), abs(wanted))
    return found == wanted
