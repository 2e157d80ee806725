"""Continue a run from a checkpoint, or refuse to, with what differs."""

from __future__ import annotations

from typing import Any

from trainer.checkpoint import random_state
from trainer.checkpoint.agreement import Ranks
from trainer.checkpoint.identity import FIX, data_differences, model_differences
from trainer.checkpoint.reader import CheckpointReader
from trainer.config.batch_schedule import samples_through, steps_for
from trainer.config.derive import Derived
from trainer.config.run import Recipe
from trainer.core.errors import Problem, RecipeError
from trainer.data.sampler import Sampler
from trainer.training.state import TrainState


def refuse_if_different(
    reader: CheckpointReader,
    expected: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    config: dict[str, Any],
    accept_changed_data: bool,
) -> list[Problem]:
    """Raise RecipeError with a field-by-field difference between the checkpoint and this run.

    Differences of the data are returned instead if they are accepted.
    """
    where = reader.directory.name
    accepted = data_differences(reader.state.get("identity", {}), expected, where)
    problems = [] if accept_changed_data else accepted
    fields = model_differences(reader.model.get("config", {}), config, where)
    problems = problems + fields
    if not fields:
        held = {name: reader.shape(name) for name in reader.names()}
        different = sorted(name for name in held.keys() | shapes.keys() if held.get(name) != shapes.get(name))
        problems += [Problem(name, shapes.get(name), f"{where} holds {held.get(name)}", FIX) for name in different[:5]]
    if problems:
        raise RecipeError(problems, title=f"can't resume from {reader.directory}")
    return accepted


def refuse_beyond_budget(recipe: Recipe, derived: Derived, sampler: Sampler) -> None:
    """Raise RecipeError if the run is longer than the budgets (epochs, tokens) of its sources together."""
    budget = sampler.budget
    # A budget that ends inside a step is filled up by that step.
    if budget is None or derived.total_steps <= (steps := steps_for(recipe.batch, budget)):
        return
    wanted = samples_through(recipe.batch, derived.total_steps)
    rule = f"reads {wanted} sequences, but the epochs and tokens of data.train add up to {budget}"
    fix = f"set run.steps to {steps}, or raise the budgets"
    raise RecipeError(Problem("run.steps", derived.total_steps, rule, fix), title="recipe refused")


def restore_generators(reader: CheckpointReader, ranks: Ranks, recipe: Recipe, state: TrainState) -> bool:
    """Restore this rank's generators, or seed them anew where it has another place. Return whether they were restored.

    Ranks that share activations must draw alike, and those that don't must not: another division of as many ranks
    can't go on with the old ones.
    """
    parallel = recipe.parallel
    places = {"pipeline": parallel.pipeline, "tensor": parallel.tensor, "sequence": parallel.sequence}
    alike = all(reader.topology.get(axis, degree) == degree for axis, degree in places.items())
    if reader.world_size == ranks.world_size and alike:
        random_state.restore(reader.random_states(ranks.rank))
        return True
    random_state.seed_everything(recipe.run.seed, ranks.rank // parallel.tensor, state.step)
    return False
