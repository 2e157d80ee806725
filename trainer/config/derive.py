"""What follows from a recipe and a number of ranks: the batch triangle, the mesh, the length of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    """Micro-batches per rank and optimizer step."""
    total_steps: int
    """Optimizer steps of the whole run."""
    tokens_per_step: int
    """Target tokens per optimizer step, over all ranks."""


def world_size_of(recipe: Recipe) -> int:
    """Return the number of ranks the recipe starts when no launcher has started them already."""
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
    tokens_per_step = recipe.batch.global_size * recipe.data.sequence_length
    return Derived(
        world_size=world_size,
        data_parallel=data_parallel,
        accumulation=recipe.batch.global_size // (recipe.batch.micro_size * data_parallel),
        total_steps=total_steps(recipe),
        tokens_per_step=tokens_per_step,
    )


def total_steps(recipe: Recipe) -> int:
    """Return the optimizer steps of the whole run."""
    if recipe.run.steps is not None:
        return recipe.run.steps
    return math.ceil((recipe.run.tokens or 0) / (recipe.batch.global_size * recipe.data.sequence_length))


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
    if total % per_pass == 0:
        return []
    rule = (
        f"must be a multiple of batch.micro_size x data-parallel ranks = {micro} x {data_parallel} = {per_pass}, "
        "so that gradient accumulation is whole"
    )
    below = total - total % per_pass
    fix = "set batch.global_size to " + " or ".join(str(size) for size in (below, below + per_pass) if size)
    if total % data_parallel == 0:
        share = total // data_parallel
        micros = [str(size) for size in range(1, min(share, 64) + 1) if share % size == 0]
        fix += f", or batch.micro_size to one of {', '.join(micros)}"
    return [Problem("batch.global_size", total, rule, fix)]


def _model_parallel(recipe: Recipe) -> int:
    """Return how many ranks share one copy of the batch. Expert ranks are data-parallel ones, so they don't count."""
    return recipe.parallel.pipeline * recipe.parallel.tensor * recipe.parallel.sequence
