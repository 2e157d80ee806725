"""Plain transformers and PyTorch in one process, for many cases. Imports nothing of the trainer.

Reads a JSON object a line: what ``trainer/verification/reference.py`` takes but the model, with "config" (fields),
"seed" and "noise" in its place. Writes the initial weights as transformers draws them (``initial.safetensors``) and the
model with noise on top as a directory to load (``model/``), and trains that. Answers with {"error": null or text}.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
# The file itself, not the package it is in.
sys.path.insert(0, str(Path(__file__).parents[1] / "trainer" / "verification"))

import reference  # pyright: ignore[reportMissingImports]
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)


def main() -> None:
    """Serve cases until standard input ends."""
    for line in sys.stdin:
        try:
            run(json.loads(line))
            error = None
        except Exception as failure:  # noqa: BLE001 - the table names it
            traceback.print_exc()
            error = f"{type(failure).__name__}: {failure}"
        print(json.dumps({"error": error}), file=answers, flush=True)


def run(job: dict[str, Any]) -> None:
    """Initialise, save and train one model."""
    output = Path(job["output"])
    output.mkdir(parents=True, exist_ok=True)
    model = initialised(job)
    reference.write(dict(model.named_parameters()), output / "initial.safetensors")
    generator = torch.Generator().manual_seed(job["seed"] + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * job["noise"])
    model.save_pretrained(output / "model")
    reference.train({**job, "model": str(output / "model")})


def initialised(job: dict[str, Any]) -> PreTrainedModel:
    """Return the model as transformers initialises it from the seed, drawn in the order of its modules."""
    config = AutoConfig.for_model(**job["config"])
    torch.manual_seed(job["seed"])  # some constructors draw
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=job["attention"])
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    torch.manual_seed(job["seed"])
    model.initialize_weights()
    return model


if __name__ == "__main__":
    main()
