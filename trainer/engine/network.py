"""What every engine does to a model before DeepSpeed sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from trainer.config.run import Recipe
from trainer.core.errors import Problem, RecipeError
from trainer.models.tiling import mlp_names, tile_mlp


def training_device(local_rank: int) -> torch.device:
    """Return this rank's device."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def refuse_on_cpu(deepspeed_json: Mapping[str, Any], device: torch.device) -> None:
    """Raise RecipeError for what DeepSpeed has kernels of for CUDA only: ZeRO++'s quantized communication."""
    for name in ("zero_quantized_weights", "zero_quantized_gradients"):
        if deepspeed_json["zero_optimization"].get(name) and device.type != "cuda":
            raise RecipeError(Problem(f"zero_optimization.{name}", True, "needs CUDA, which is not here", "remove it"))


def prepare_network(network: PreTrainedModel, recipe: Recipe, whole: PreTrainedModel | None = None) -> None:
    """Switch on what the recipe asks of the model; of a stage of ``whole``, as far as it holds it.

    Raises RecipeError, on all ranks alike, if the model can't do it.
    """
    if recipe.memory.activation_checkpointing == "full":
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    size = recipe.memory.tiled_mlp
    if size is not None:
        held = dict(network.named_modules())
        for name in mlp_names(whole or network, size):
            if name in held:
                tile_mlp(held[name], size)
