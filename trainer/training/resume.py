"""Continue a run from a checkpoint, or refuse to, with what differs."""

from __future__ import annotations

from typing import Any

from trainer.checkpoint import random_state
from trainer.checkpoint.agreement import Ranks
from trainer.checkpoint.reader import CheckpointReader
from trainer.config.run import Recipe
from trainer.core.errors import Problem, RecipeError
from trainer.data.order import ORDER_VERSION
from trainer.training.state import TrainState

_SHAPE_FIELDS = (
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "tie_word_embeddings", "n_embd", "n_layer", "n_head"),
)


def identity(recipe: Recipe, data_fingerprint: str) -> dict[str, Any]:
    """Return what must be the same for a resume to read the same samples in the same order."""
    return {
        "run.seed": recipe.run.seed,
        "data.sequence_length": recipe.data.sequence_length,
        "data.train": data_fingerprint,
        "order version": ORDER_VERSION,
    }


def refuse_if_different(
    reader: CheckpointReader, expected: dict[str, Any], shapes: dict[str, tuple[int, ...]], config: dict[str, Any]
) -> None:
    """Raise RecipeError with a field-by-field difference between the checkpoint and this run."""
    where = reader.directory.name
    fix = "restore it, or use another run.directory (model.path = the old run starts from its weights)"
    stored = reader.state.get("identity", {})
    problems = [
        Problem(key, value, f"{where} was written with {stored.get(key)!r}", fix)
        for key, value in expected.items()
        if stored.get(key) != value
    ]
    old = reader.model.get("config", {})
    fields = [name for name in _SHAPE_FIELDS if name in config and config[name] != old.get(name)]
    problems += [
        Problem(f"model.config.{name}", config[name], f"{where} was written with {old.get(name)!r}", fix)
        for name in fields
    ]
    if not fields:
        held = {name: reader.shape(name) for name in reader.names()}
        different = sorted(name for name in held.keys() | shapes.keys() if held.get(name) != shapes.get(name))
        problems += [Problem(name, shapes.get(name), f"{where} holds {held.get(name)}", fix) for name in different[:5]]
    if problems:
        raise RecipeError(problems, title=f"can't resume from {reader.directory}")


def restore_generators(reader: CheckpointReader, ranks: Ranks, seed: int, state: TrainState) -> bool:
    """Restore this rank's generators; at another number of ranks seed them anew. Return whether they were restored."""
    if reader.world_size == ranks.world_size:
        random_state.restore(reader.random_states(ranks.rank))
        return True
    random_state.seed_everything(seed, ranks.rank, state.step)
    return False
