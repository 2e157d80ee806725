"""What follows from a recipe and a number of ranks: the batch triangle, the mesh, the length of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.config.batch_schedule import samples_through, steps_for
from trainer.config.hostfile import hosts_of
from trainer.config.parallel import BatchConfig
from trainer.config.run import Recipe
from trainer.core.errors import Problem, RecipeError


@dataclass(frozen=True)
class Derived:
    """Numbers nobody writes down: global = micro x accumulation x data-parallel."""

    world_size: int
    """Ranks."""
    data_parallel: int
    """Ranks that see different sequences."""
    accumulation: int
    """Micro-batches per rank and optimizer step of full size."""
    total_steps: int
    """Optimizer steps of the whole run."""
    tokens_per_step: int
    """Target tokens per optimizer step of full size, over all ranks."""
    total_tokens: int
    """Target tokens of the whole run."""


def world_size_of(recipe: Recipe) -> int:
    """Return the number of ranks the recipe starts when no launcher has started them already.

    Raises RecipeError where the hostfile of launch.launcher: ssh can't be used.
    """
    if recipe.launch.launcher == "ssh":
        return sum(len(host.slots) for host in hosts_of(recipe.launch))
    if recipe.launch.launcher == "slurm":
        slurm = recipe.launch.slurm
        return slurm.nodes * (slurm.gpus_per_node or recipe.launch.processes)
    return recipe.launch.processes


def derive(recipe: Recipe, world_size: int) -> Derived:
    """Return the derived numbers.

    Raises:
        RecipeError: the mesh does not fit the ranks, or the batch does not divide over them.
    """
    problems = derive_problems(recipe, world_size)
    if problems:
        raise RecipeError(problems)
    data_parallel = world_size // _model_parallel(recipe)
    steps, length = total_steps(recipe), recipe.data.sequence_length
    return Derived(
        world_size=world_size,
        data_parallel=data_parallel,
        accumulation=recipe.batch.global_size // (recipe.batch.micro_size * data_parallel),
        total_steps=steps,
        tokens_per_step=recipe.batch.global_size * length,
        total_tokens=samples_through(recipe.batch, steps) * length,
    )


def total_steps(recipe: Recipe) -> int:
    """Return the optimizer steps of the whole run."""
    if recipe.run.steps is not None:
        return recipe.run.steps
    return steps_for(recipe.batch, math.ceil((recipe.run.tokens or 0) / recipe.data.sequence_length))


def derive_problems(recipe: Recipe, world_size: int) -> list[Problem]:
    """Return why nothing can be derived; the fix names values that would do."""
    if world_size < 1:
        return [Problem("world size", world_size, "must be at least 1", "start at least one rank")]
    parallel = recipe.parallel
    mesh = _model_parallel(recipe) * parallel.expert
    if world_size % mesh:
        rule = (
            f"world size {world_size} is not a multiple of pipeline x tensor x sequence x expert = "
            f"{parallel.pipeline} x {parallel.tensor} x {parallel.sequence} x {parallel.expert} = {mesh}"
        )
        below = world_size - world_size % mesh
        sizes = " or ".join(str(size) for size in (below, below + mesh) if size)
        return [Problem("parallel", None, rule, f"start {sizes} ranks, or lower a degree")]
    return _batch_problems(recipe, world_size // _model_parallel(recipe))


def _batch_problems(recipe: Recipe, data_parallel: int) -> list[Problem]:
    total, micro = recipe.batch.global_size, recipe.batch.micro_size
    per_pass = micro * data_parallel
    rule = (
        f"must be a multiple of batch.micro_size x data-parallel ranks = {micro} x {data_parallel} = {per_pass}, "
        "so that gradient accumulation is whole"
    )
    warmup = _warmup_problems(recipe.batch, per_pass, rule)
    if total % per_pass == 0:
        return warmup
    below = total - total % per_pass
    fix = "set batch.global_size to " + " or ".join(str(size) for size in (below, below + per_pass) if size)
    if total % data_parallel == 0:
        share = total // data_parallel
        micros = [str(size) for size in range(1, min(share, 64) + 1) if share % size == 0]
        fix += f", or batch.micro_size to one of {', '.join(micros)}"
    return [Problem("batch.global_size", total, rule, fix), *warmup]


def _warmup_problems(batch: BatchConfig, per_pass: int, rule: str) -> list[Problem]:
    """Return which sizes of the warm-up don't divide; the fix names a start and an increment that do."""
    if (warmup := batch.warmup) is None:
        return []
    given = {"start_size": warmup.start_size, "increment": warmup.increment}
    start = max(per_pass, warmup.start_size - warmup.start_size % per_pass)
    way = batch.global_size - start
    if batch.global_size % per_pass:
        fix = f"use multiples of {per_pass}"
    elif way <= 0:
        fix = "remove batch.warmup, or raise batch.global_size"
    else:
        whole = [step for step in range(per_pass, way + 1, per_pass) if way % step == 0 and way // step <= warmup.steps]
        increment = min(whole, key=lambda step: abs(step - warmup.increment))
        fix = f"set batch.warmup.start_size to {start} and batch.warmup.increment to {increment}"
    return [Problem(f"batch.warmup.{name}", size, rule, fix) for name, size in given.items() if size % per_pass]


def _model_parallel(recipe: Recipe) -> int:
    """Return how many ranks share one copy of the batch. Expert ranks are data-parallel ones, so they don't count."""
    return recipe.parallel.pipeline * recipe.parallel.tensor * recipe.parallel.sequence
