"""Plain transformers and PyTorch in one process: what every layout must reproduce. Imports nothing of the trainer.

Reads a JSON object a line: {"config": {...}, "dtype": "float32", "attention": "sdpa", "seed": N, "noise": x,
"batches": PATH, "optimizer": {the recipe's section}, "output": DIRECTORY}. Writes into ``output`` the initial weights
as transformers initialises them (``initial.safetensors``), the model with noise on top as a directory to load
(``model/``), and the same files as ``compatibility_ranks.py``. Answers with {"error": null or text}.
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

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
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
    """Train one model for a few steps and write what came out."""
    output = Path(job["output"])
    output.mkdir(parents=True, exist_ok=True)
    model = _initialised(job)
    _write(dict(model.named_parameters()), output / "initial.safetensors")
    generator = torch.Generator().manual_seed(job["seed"] + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * job["noise"])
    model.save_pretrained(output / "model")
    model = AutoModelForCausalLM.from_pretrained(
        output / "model", dtype=torch.float32, attn_implementation=job["attention"]
    ).train()
    optimizer = _optimizer(model, job["optimizer"])
    batches = load_file(job["batches"])
    steps: list[list[float]] = []
    for step, tokens in enumerate(batches["tokens"]):
        optimizer.zero_grad()
        documents = batches["documents"][step] if "documents" in batches else None
        count = sum(len(targets) for _, targets in _sequences(tokens, documents))
        total = 0.0
        for inputs, targets in _sequences(tokens, documents):
            logits = model(input_ids=inputs[None], use_cache=False).logits[0]
            loss = nn.functional.cross_entropy(logits, targets, reduction="sum") / count
            loss.backward()
            total += loss.item()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        steps.append([total, nn.utils.get_total_norm(gradients.values()).item()])
        if step == 0:
            _write(gradients, output / "gradients.safetensors")
        optimizer.step()
    _write(dict(model.named_parameters()), output / "weights.safetensors")
    (output / "result.json").write_text(json.dumps({"steps": steps}))


class _Lion(torch.optim.Optimizer):
    """Algorithm 2 of https://arxiv.org/abs/2302.06675."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        del closure
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("m", torch.zeros_like(parameter))
                update = torch.sign(first * momentum + (1 - first) * parameter.grad)
                self.state[parameter]["m"] = second * momentum + (1 - second) * parameter.grad
                parameter.copy_(parameter - group["lr"] * (update + group["weight_decay"] * parameter))


def _optimizer(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """Return torch's own by the recipe's name; Lion, which torch has not, is written out above."""
    settings = dict(settings)
    name, rate = settings.pop("name"), settings.pop("learning_rate")
    settings.pop("clip_norm")
    if "epsilon" in settings:
        settings["eps"] = settings.pop("epsilon")
    if name == "lion":
        return _Lion(model.parameters(), {"lr": rate, **settings})
    made = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "adagrad": torch.optim.Adagrad}[name]
    return made(model.parameters(), lr=rate, **settings)


def _initialised(job: dict[str, Any]) -> PreTrainedModel:
    """Return the model as transformers initialises it from the seed, drawn in the order of its modules."""
    config = AutoConfig.for_model(**job["config"])
    torch.manual_seed(job["seed"])  # some constructors draw
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=job["attention"])
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    torch.manual_seed(job["seed"])
    model.initialize_weights()
    return model


def _sequences(tokens: torch.Tensor, documents: torch.Tensor | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (inputs, targets) of every sequence, or of every document alone: none sees another."""
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for number, row in enumerate(tokens):
        if documents is None:
            pairs.append((row[:-1], row[1:]))
            continue
        for document in documents[number].unique_consecutive():
            places = (documents[number] == document).nonzero().flatten()
            first, last = int(places[0]), int(places[-1])
            end = last + 1 if last + 1 == len(documents[number]) else last
            if end > first:
                pairs.append((row[first:end], row[first + 1 : end + 1]))
    return pairs


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, path)


if __name__ == "__main__":
    main()
