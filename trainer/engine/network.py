"""What every engine does to a model before DeepSpeed sees it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from trainer.config.run import Recipe


def training_device(local_rank: int) -> torch.device:
    """Return this rank's device."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def prepare_network(network: PreTrainedModel, recipe: Recipe) -> None:
    """Switch on what the recipe asks of the model."""
    if recipe.memory.activation_checkpointing == "full":
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
