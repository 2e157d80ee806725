"""What a run and a checkpoint must have in common for one to continue the other; torch-free, so ``check`` knows too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.config.run import Recipe
from trainer.core.errors import Problem
from trainer.data.order import ORDER_VERSION

FIX = "restore it, or use another run.directory (model.path = the old run starts from its weights)"
_SHAPE_FIELDS = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "tie_word_embeddings", "n_embd", "n_layer", "n_head",
)  # fmt: skip


DATA_FIX = "restore it, use another run.directory, or set checkpoint.accept_changes: [data] to go on with other data"
_IMPORTED_FIX = (
    "set checkpoint.accept_changes: [data] to go on with this data, or use another run.directory (model.path = the "
    "imported run starts from its weights)"
)


def data_identity(recipe: Recipe, data_fingerprint: str) -> dict[str, Any]:
    """Return what must be the same for a resume to read the same samples in the same order.

    ``data_fingerprint`` is the sampler's, of the samples consumed so far.
    """
    return {
        "run.seed": recipe.run.seed,
        "data.sequence_length": recipe.data.sequence_length,
        "data.train": data_fingerprint,
        "order version": ORDER_VERSION,
    }


def data_differences(stored: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> list[Problem]:
    """Return one problem for each field of ``expected`` that the checkpoint ``where`` holds otherwise.

    An imported checkpoint holds none of them: that is one problem.
    """
    if not stored:
        rule = f"which data {where} was trained on is not known: it was imported"
        return [Problem("data.train", expected.get("data.train"), rule, _IMPORTED_FIX)]
    return [
        Problem(key, value, f"{where} was written with {stored.get(key)!r}", DATA_FIX)
        for key, value in expected.items()
        if stored.get(key) != value
    ]


def model_differences(stored: Mapping[str, Any], config: Mapping[str, Any], where: str) -> list[Problem]:
    """Return one problem for each field of ``config`` that gives weights another shape than the checkpoint's."""
    return [
        Problem(f"model.config.{name}", config[name], f"{where} was written with {stored.get(name)!r}", FIX)
        for name in _SHAPE_FIELDS
        if name in config and config[name] != stored.get(name)
    ]
