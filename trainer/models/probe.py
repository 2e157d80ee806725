"""Measure how fast this machine trains the recipe's model, by dtype; run once a rank, all at the same time."""

from __future__ import annotations

import json
import sys
import time

import torch

from trainer.config.load import load_recipe
from trainer.config.run import Recipe
from trainer.models.build import build_model
from trainer.models.config import hugging_face_config
from trainer.models.loss import cross_entropy_by_row

_MEASURED = 2
"""Passes timed; one before them warms up."""


def dtypes_worth_trying() -> list[str]:
    """Return float32, and bfloat16 where the hardware multiplies it natively (elsewhere it is slower)."""
    native = (
        torch.cuda.is_bf16_supported() if torch.cuda.is_available() else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return ["float32", "bfloat16"] if native else ["float32"]


def seconds_per_micro_batch(recipe: Recipe, dtype: str) -> float:
    """Return the seconds of one forward and backward pass of ``batch.micro_size`` sequences on this process."""
    section = recipe.model.model_copy(update={"dtype": dtype})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = build_model(section, hugging_face_config(section), seed=0, device=device).train()
    shape = (recipe.batch.micro_size, recipe.data.sequence_length)
    tokens = torch.randint(network.config.vocab_size, shape, device=device)
    seconds = []
    for _ in range(1 + _MEASURED):
        started = time.perf_counter()
        cross_entropy_by_row(network(input_ids=tokens, use_cache=False).logits, tokens).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def main() -> None:
    """Print {"dtypes": {dtype: seconds}, "devices": number of GPUs} as one JSON line."""
    recipe = load_recipe(sys.argv[1])
    measured = {dtype: seconds_per_micro_batch(recipe, dtype) for dtype in dtypes_worth_trying()}
    print(json.dumps({"dtypes": measured, "devices": torch.cuda.device_count()}))


if __name__ == "__main__":
    main()
