"""What a run needs of its nodes, estimated from the recipe without building the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from trainer.checkpoint.layout import newest, read_manifest
from trainer.config.model_fields import EXPERT_COUNTS, ModelFields, model_fields
from trainer.config.run import Recipe
from trainer.models.flops import decoder_block_parameters
from trainer.optim.table import TABLE

_MASTER_BYTES = 4
"""Weights and optimizer state are float32 in checkpoints."""


@dataclass(frozen=True)
class Needs:
    """What must be there before training."""

    checkpoint_bytes: int | None
    """Of one checkpoint; None: not known, because the model is a download."""
    checkpoints: int
    """How many there will be at once, less those that are there already."""
    checkpoint_files: int
    open_files: int
    gpus_per_node: int
    """0: none is asked for."""


def needs_of(recipe: Recipe, world_size: int, local_world_size: int) -> Needs:
    """Return what ``recipe`` needs on so many ranks."""
    here = list((Path(recipe.run.directory) / "checkpoints").glob("step-*"))
    by_slurm = recipe.launch.launcher == "slurm"
    return Needs(
        checkpoint_bytes=checkpoint_bytes(recipe),
        # Old ones go after the new one is committed: one more than are kept.
        checkpoints=max(1, recipe.checkpoint.keep_last + 1 - len(here)),
        checkpoint_files=world_size + 4,
        # gloo connects each rank with every other, in a few groups; shards, logs and libraries take some hundred.
        open_files=512 + 4 * world_size,
        gpus_per_node=min(recipe.launch.slurm.gpus_per_node, local_world_size) if by_slurm else 0,
    )


def checkpoint_bytes(recipe: Recipe) -> int | None:
    """Return the size of one checkpoint: as the newest has it, or by the number of parameters."""
    found = newest(Path(recipe.run.directory))
    files: Any = (read_manifest(found[1]) or {}).get("files") if found is not None else None
    if isinstance(files, dict) and files:
        sizes = [entry.get("bytes") for entry in cast("dict[str, dict[str, Any]]", files).values()]
        if all(type(size) is int for size in sizes):
            return sum(cast("list[int]", sizes))
    parameters = estimated_parameters(model_fields(recipe.model))
    if parameters is None:
        return None
    states = len(TABLE[recipe.optimizer.name].state_of(recipe.optimizer))
    return parameters * _MASTER_BYTES * (1 + states)


def estimated_parameters(fields: ModelFields) -> int | None:
    """Return about how many parameters a decoder of these fields has; None where a field is not known."""
    hidden, layers = fields.number("hidden_size"), fields.number("num_hidden_layers")
    heads, vocabulary = fields.number("num_attention_heads"), fields.number("vocab_size")
    if not hidden or not layers or not heads or not vocabulary:
        return None
    kept = fields.number("intermediate_size") or 4 * hidden
    experts = next((count for name in EXPERT_COUNTS if (count := fields.number(name))), 1)
    attention, block = (
        decoder_block_parameters(
            hidden_size=hidden,
            intermediate_size=size,
            num_attention_heads=heads,
            num_key_value_heads=fields.number("num_key_value_heads") or heads,
            head_dim=fields.number("head_dim") or hidden // heads,
        )
        for size in (0, kept)
    )
    ends = vocabulary * hidden * (1 if fields.get("tie_word_embeddings") else 2)
    return layers * (attention + experts * (block - attention)) + ends
