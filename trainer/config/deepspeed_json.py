"""Turn a base DeepSpeed JSON and the recipe into the JSON that runs: every "auto" filled, every mismatch refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from trainer.config.deepspeed_file import DeepSpeedFile, read_deepspeed_file
from trainer.config.deepspeed_rules import optimizer_problems, refused_problems, same, value_at
from trainer.config.derive import Derived
from trainer.config.model_fields import model_fields
from trainer.config.run import Recipe
from trainer.core.errors import Problem, RecipeError

# DeepSpeed prints a line every so many steps; the pipeline engine divides by it, so null is no way to silence it.
NEVER_PRINT = 1_000_000_000
# Buckets of hidden_size ** 2 elements cost a small model one collective per few thousand numbers.
SMALLEST_BUCKET = 1_000_000
# Elements of a buffer that a rank's part of a parameter on NVMe is read into; raised to the largest parameter's where
# the model is known (trainer/engine/state_nvme.py).
SMALLEST_BUFFER = 1_000_000
# Literal values of DeepSpeed's own, not ours to fill.
LITERAL_AUTO = {"data_types.keep_in_fp32_modules"}
# That DeepSpeed's operations may take to compile: async_io took five minutes on two cores.
BUILD_SECONDS = 1200


def resolve_deepspeed(recipe: Recipe, derived: Derived) -> dict[str, Any]:
    """Return the complete DeepSpeed JSON of the run. ``optimizer`` and ``scheduler`` are ours and left out.

    Raises:
        RecipeError: with every problem of the JSON.
    """
    resolved, problems = _resolve(recipe, derived)
    if resolved is None or problems:
        raise RecipeError(problems, title=f"DeepSpeed JSON {recipe.deepspeed.base} refused")
    return resolved


def builds_operations(values: Mapping[str, Any]) -> bool:
    """Return whether a run with this resolved JSON needs operations that DeepSpeed compiles."""
    sections = ("offload_optimizer", "offload_param")
    return any(value_at(values, f"zero_optimization.{section}.device") == "nvme" for section in sections)


def deepspeed_problems(recipe: Recipe, derived: Derived | None) -> list[Problem]:
    """Return everything wrong with the DeepSpeed JSON: keys, types, features that fight us, mismatches, "auto".

    Without ``derived`` (the batch does not divide over the ranks) mismatches of the batch can't be told.
    """
    if derived is not None:
        return _resolve(recipe, derived)[1]
    file, problems = read_deepspeed_file(recipe.deepspeed.base, recipe.deepspeed.override)
    return problems if file is None else [*problems, *refused_problems(file), *optimizer_problems(file, recipe)]


def stage_of(resolved: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a resolved JSON."""
    return int(value_at(resolved, "zero_optimization.stage") or 0)


def _resolve(recipe: Recipe, derived: Derived) -> tuple[dict[str, Any] | None, list[Problem]]:
    file, problems = read_deepspeed_file(recipe.deepspeed.base, recipe.deepspeed.override)
    if file is None:
        return None, problems
    resolved = _copied(file.values)
    if "bfloat16" in resolved:  # DeepSpeed's old name of the section, ignored by it when both are there
        old = resolved.pop("bfloat16")
        if "bf16" in resolved:
            rule = "is the old name of bf16, and both are given"
            problems.append(Problem(file.key("bfloat16"), None, rule, "remove bfloat16"))
        else:
            resolved["bf16"] = old
    problems += [*refused_problems(file), *optimizer_problems(file, recipe)]
    for key in ("fp16", "optimizer", "scheduler"):
        resolved.pop(key, None)
    problems += _fill_agreed(resolved, file, recipe, derived)
    _fill_free(resolved, recipe)
    told = {problem.key for problem in problems}
    for path in _remaining_auto(resolved, ""):
        if file.key(path) not in told:
            rule = "nothing in the recipe says what this auto should be"
            problems.append(Problem(file.key(path), "auto", rule, "write a value or remove the key"))
    return resolved, problems


def _agreed(recipe: Recipe, derived: Derived) -> tuple[tuple[str, Any, str], ...]:
    """Return (path, value, where it comes from) of what the recipe decides and the JSON may only repeat."""
    # Ranks that share a sequence are data-parallel ones to DeepSpeed.
    batch = "batch.global_size" + (" x parallel.sequence" if recipe.parallel.sequence > 1 else "")
    triangle = "batch.global_size / (batch.micro_size x data-parallel ranks)"
    return (
        ("train_batch_size", recipe.batch.global_size * recipe.parallel.sequence, batch),
        ("train_micro_batch_size_per_gpu", recipe.batch.micro_size, "batch.micro_size"),
        ("gradient_accumulation_steps", derived.accumulation, triangle),
        ("gradient_clipping", recipe.optimizer.clip_norm, "optimizer.clip_norm"),
        ("bf16.enabled", recipe.model.dtype == "bfloat16", f"model.dtype = {recipe.model.dtype}, so bf16.enabled"),
        ("zero_allow_untested_optimizer", True, "the trainer's own torch optimizer, which needs this"),
        ("zero_force_ds_cpu_optimizer", False, "the trainer's own torch optimizer, which needs this"),
    )


def _fill_agreed(resolved: dict[str, Any], file: DeepSpeedFile, recipe: Recipe, derived: Derived) -> Iterator[Problem]:
    for path, wanted, source in _agreed(recipe, derived):
        found = value_at(resolved, path)
        if found is not None and found != "auto" and not same(found, wanted):
            yield Problem(file.key(path), found, f"disagrees with {source} = {_json(wanted)}", 'set it to "auto"')
        _set(resolved, path, wanted)
    _set(resolved, "data_types.grad_accum_dtype", "fp32")
    for path, wanted, source in (
        ("data_types.param_dtype", {"bfloat16": "bf16", "float32": "fp32"}[recipe.model.dtype], "model.dtype"),
        ("sequence_parallel_size", recipe.parallel.sequence, "parallel.sequence"),
        ("data_parallel_size", derived.data_parallel, "the number of data-parallel ranks"),
        ("pipeline.stages", recipe.parallel.pipeline, "parallel.pipeline"),
    ):
        found = value_at(resolved, path)
        if found is None:
            continue
        if found != "auto" and not same(found, wanted):
            yield Problem(file.key(path), found, f"disagrees with {source} = {_json(wanted)}", "remove it")
        _set(resolved, path, wanted)
    resolved.pop("sequence_parallel_size", None)  # the trainer's own, see models/shard_sequence.py
    resolved.pop("data_parallel_size", None)


def _fill_free(resolved: dict[str, Any], recipe: Recipe) -> None:
    """Fill the "auto" values that are nobody's business but DeepSpeed's."""
    zero = resolved.setdefault("zero_optimization", {"stage": 0})
    if isinstance(zero, dict):
        section = cast("dict[str, Any]", zero)
        section.setdefault("stage", 0)
        for name, value in _zero_defaults(recipe).items():
            if section.get(name) == "auto":
                section[name] = value
        for name in ("offload_optimizer", "offload_param"):
            if value_at(section, f"{name}.device") == "nvme":
                _fill_nvme(section[name], recipe)
    if resolved.get("communication_data_type") in (None, "auto"):
        resolved["communication_data_type"] = "fp32"
    if resolved.get("steps_per_print") in (None, "auto", 0):
        resolved["steps_per_print"] = NEVER_PRINT
    for path in ("wall_clock_breakdown", "memory_breakdown", "prescale_gradients"):
        if resolved.get(path) == "auto":
            resolved[path] = False


def _fill_nvme(section: dict[str, Any], recipe: Recipe) -> None:
    """Give a run files of its own: DeepSpeed names them by rank alone, so two runs would write into each other's."""
    directory = Path(recipe.run.directory).absolute()
    path = section.get("nvme_path")
    if path in (None, "auto"):
        section["nvme_path"] = str(directory / "offload")
    elif isinstance(path, str):
        digest = hashlib.sha256(str(directory).encode()).hexdigest()[:8]
        section["nvme_path"] = str(Path(path).expanduser() / f"{recipe.run.name}-{digest}")
    if section.get("buffer_size") == "auto":
        section["buffer_size"] = SMALLEST_BUFFER


def _zero_defaults(recipe: Recipe) -> dict[str, Any]:
    hidden = model_fields(recipe.model).number("hidden_size")
    squared = hidden * hidden if hidden else None
    # Formulas of transformers' DeepSpeed integration; DeepSpeed's own defaults where the size is unknown.
    prefetch = int(0.9 * squared) if squared else 50_000_000
    persistence = 10 * hidden if hidden else 100_000
    bucket = max(squared, SMALLEST_BUCKET) if squared else 500_000_000
    sizes: dict[str, Any] = {
        "prefetch_bucket_size": prefetch,
        "param_persistence_threshold": persistence,
        "max_live_parameters": 1_000_000_000,
        "max_reuse_distance": 1_000_000_000,
        "gather_16bit_weights_on_model_save": False,
    }
    sizes |= {f"stage3_{name}": value for name, value in sizes.items()}
    return sizes | {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": 500_000_000,
        "sub_group_size": 1_000_000_000,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "allgather_partitions": True,
        "round_robin_gradients": False,
    }


def _remaining_auto(value: Any, prefix: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, below in cast("Mapping[str, Any]", value).items():
            yield from _remaining_auto(below, f"{prefix}{name}.")
    elif isinstance(value, list):
        for index, below in enumerate(cast("list[Any]", value)):
            yield from _remaining_auto(below, f"{prefix}{index}.")
    elif value == "auto" and prefix[:-1] not in LITERAL_AUTO:
        yield prefix[:-1]


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for part in parents:
        below = values.get(part)
        if not isinstance(below, dict):
            below = values[part] = {}
        values = cast("dict[str, Any]", below)
    values[last] = value


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(below) for key, below in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, list):
        return [_copied(below) for below in cast("list[Any]", value)]
    return value


def _json(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
