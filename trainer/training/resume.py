"""Continue a run from a checkpoint, or refuse to, with what differs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer.checkpoint import layout, random_state
from trainer.checkpoint.agreement import Ranks
from trainer.checkpoint.changes import Changes, names_frozen, some_of, stateless_names, training_changes
from trainer.checkpoint.differences import library_differences, recipe_differences, shape_difference
from trainer.checkpoint.identity import FIX, data_differences, model_differences
from trainer.checkpoint.newly_trained import NewlyTrainedReader
from trainer.checkpoint.provenance import library_versions
from trainer.checkpoint.reader import CheckpointReader
from trainer.config.batch_schedule import samples_through, steps_for
from trainer.config.derive import Derived
from trainer.config.run import Recipe
from trainer.core.errors import Problem, RecipeError
from trainer.data.sampler import Sampler
from trainer.engine.base import TrainEngine
from trainer.training.state import TrainState

logger = logging.getLogger(__name__)

_SHOWN_LINES = 12
_DIFFERENT_SHAPES = 5


@dataclass(frozen=True)
class Resumption:
    """A checkpoint and the run that is to continue it."""

    recipe: Recipe
    reader: CheckpointReader
    ranks: Ranks
    state: TrainState
    say: Callable[[str], None]
    """Tell the user; silent on all ranks but the first."""


def load_checkpoint(
    here: Resumption, engine: TrainEngine, config: dict[str, Any], identity: dict[str, Any], topology: dict[str, int]
) -> None:
    """Fill ``engine``, count and draw on from the checkpoint; say what differs from the run that wrote it.

    ``config`` and ``identity`` are this run's, ``topology`` has the manifest's fields. Raises RecipeError, on every
    rank alike, for what differs and was not accepted by name.
    """
    manifest = layout.read_manifest(here.reader.directory) or {}
    changes = refuse_if_different(here, manifest, engine, config, identity)
    say_differences(here, manifest, topology)
    if changes.optimizer:
        here.say(
            "accepted (checkpoint.accept_changes: [optimizer]): weights are loaded, the optimizer starts afresh; "
            "counters, schedule and data go on"
        )
        engine.load_state(here.reader, None)
        here.state.optimizer_steps = 0
    else:
        for names, what in (
            (changes.newly_trained, "trained from now on, without optimizer state at first"),
            (changes.newly_frozen, "frozen from now on, the optimizer state is dropped"),
        ):
            if names:
                here.say(f"accepted (checkpoint.accept_changes: [frozen]): {some_of(names)} {what}")
        reader = NewlyTrainedReader(here.reader, changes.newly_trained) if changes.newly_trained else here.reader
        engine.load_state(reader, here.state.optimizer_steps)
    if (reason := restore_generators(here)) is not None:
        here.say(f"{reason}: random generators start anew")


def refuse_if_different(
    here: Resumption,
    manifest: dict[str, Any],
    engine: TrainEngine,
    config: dict[str, Any],
    identity: dict[str, Any],
) -> Changes:
    """Raise RecipeError with a field-by-field difference between the checkpoint and this run.

    What was accepted by name is returned (optimizer, frozen) or said (data) instead.
    """
    reader, accepted, where = here.reader, here.recipe.checkpoint.accepted, here.reader.directory.name
    data = data_differences(reader.state.get("identity", {}), identity, where)
    shapes = _shape_problems(reader, engine, config)
    changes = Changes()
    if not shapes:
        known = names_frozen(manifest)
        changes = training_changes(
            manifest, here.recipe, where, None if known else _without_state(here, manifest, engine)
        )
    problems = [
        *([] if "data" in accepted else data),
        *shapes,
        *([] if "optimizer" in accepted else changes.optimizer),
        *([] if "frozen" in accepted else changes.frozen),
    ]
    if problems:
        raise RecipeError(problems, title=f"can't resume from {reader.directory}")
    for problem in data:
        here.say(f"warning: accepted (checkpoint.accept_changes: [data]): {problem.key}: {problem.rule}")
    return changes


def _shape_problems(reader: CheckpointReader, engine: TrainEngine, config: dict[str, Any]) -> list[Problem]:
    where, shapes = reader.directory.name, engine.logical_shapes()
    fields = model_differences(reader.model.get("config", {}), config, where)
    if fields:
        return fields
    held = {name: reader.shape(name) for name in reader.names()}
    different = sorted(name for name in held.keys() | shapes.keys() if held.get(name) != shapes.get(name))
    return [
        Problem(name, shapes.get(name), f"{where} holds {held.get(name)}", FIX)
        for name in different[:_DIFFERENT_SHAPES]
    ]


def _without_state(here: Resumption, manifest: dict[str, Any], engine: TrainEngine) -> set[str]:
    """Return the parameters that are trained now and have no optimizer state in the checkpoint, of all ranks."""
    stateless = stateless_names(manifest)
    mine = {piece.name for piece in engine.iterate_state() if piece.key != "weight" and piece.name in stateless}
    return {name for names in here.ranks.gather(mine) for name in names}


def say_differences(here: Resumption, manifest: dict[str, Any], topology: dict[str, int]) -> None:
    """Say which libraries, layout and keys of the recipe are not those of the run that wrote the checkpoint."""
    if here.recipe.checkpoint.accept_changed_data:
        here.say("warning: checkpoint.accept_changed_data is an old name: write checkpoint.accept_changes: [data]")
    dtype = here.recipe.model.dtype
    libraries = library_differences(manifest.get("libraries"), library_versions())
    for sentence in (libraries, shape_difference(manifest, topology, dtype)):
        if sentence is not None:
            here.say(sentence)
    lines = recipe_differences(manifest.get("recipe"), here.recipe)
    if not lines:
        return
    here.say(
        f"the recipe differs from that of {here.reader.directory.name} and counts from here on; "
        "counters, the position in schedule and data are the checkpoint's:"
    )
    shown = lines if len(lines) <= _SHOWN_LINES else lines[: _SHOWN_LINES - 1]
    for line in lines:
        logger.info("recipe: %s", line)
    for line in shown:
        here.say(f"  {line}")
    if len(shown) < len(lines):
        here.say(f"  and {len(lines) - len(shown)} more, in the log of rank 0")


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


def restore_generators(here: Resumption) -> str | None:
    """Restore this rank's generators, or seed them anew where it has another place. Return why they start anew.

    Ranks that share activations must draw alike, and those that don't must not: another division of as many ranks
    can't go on with the old ones. A checkpoint that was rewritten for another number of ranks holds none.
    """
    reader, ranks, parallel = here.reader, here.ranks, here.recipe.parallel
    places = {"pipeline": parallel.pipeline, "tensor": parallel.tensor, "sequence": parallel.sequence}
    alike = all(reader.topology.get(axis, degree) == degree for axis, degree in places.items())
    same_place = reader.world_size == ranks.world_size and alike
    if same_place and (states := reader.random_states(ranks.rank)):
        random_state.restore(states)
        return None
    random_state.seed_everything(here.recipe.run.seed, ranks.rank // parallel.tensor, here.state.step)
    if same_place:
        return f"{reader.directory.name} holds no states of random generators"
    where = "as many, divided otherwise" if reader.world_size == ranks.world_size else str(ranks.world_size)
    return f"resuming {reader.world_size} ranks' checkpoint on {where}"
