"""Plain transformers and PyTorch in one process: what every layout must reproduce. Imports nothing of the trainer.

usage: python reference.py JOB.json, where the job is
{"model": directory, "attention": name, "batches": safetensors, "optimizer": {"name": ..., torch's keyword arguments},
"groups": {trained parameter: [weight decay, learning-rate ratio]} or absent: all alike, "orthogonal": regular
expressions that match the names of the matrices that Muon takes, "clip_norm": x,
"learning_rates": [one a step], "micro_size": sequences over which experts balance their load, 1 if absent,
"output": directory}.

``batches`` holds ``tokens``, int64 [steps, sequences, sequence + 1], and optionally ``documents``, int64 [steps,
sequences, sequence]: numbers of documents, each of which is run alone. Writes ``gradients.safetensors`` of the first
step, ``weights.safetensors`` after the last and ``result.json``.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of https://arxiv.org/abs/2302.06675, which torch has not."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter."""
        del closure
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("m", torch.zeros_like(parameter))
                update = torch.sign(first * momentum + (1 - first) * parameter.grad)
                self.state[parameter]["m"] = second * momentum + (1 - second) * parameter.grad
                parameter.copy_(parameter - group["lr"] * (update + group["weight_decay"] * parameter))


class Muon(torch.optim.Optimizer):
    """Whole matrices, one after the other, as in https://kellerjordan.github.io/posts/muon/, sized like AdamW's steps.

    torch's own computes in bfloat16 and takes no stacked experts.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                mean = self.state[parameter].setdefault("m", torch.zeros_like(parameter))
                mean.copy_(group["momentum"] * mean + (1 - group["momentum"]) * parameter.grad)
                mixed = group["momentum"] * mean + (1 - group["momentum"]) * parameter.grad
                shape = parameter.shape
                steps = torch.stack([newton_schulz(m) for m in mixed.view(-1, *shape[-2:])]).view(shape)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(group["lr"] * 0.2 * max(shape[-2:]) ** 0.5 * steps)


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Return it with singular values near 1, by five steps of the post's polynomial."""
    x = matrix / matrix.norm().clamp(min=1e-7)
    for _ in range(5):
        inner, outer = x.T @ x, x @ x.T
        # The smaller of the two products: the same polynomial of x.
        if len(inner) < len(outer):
            x = 3.4445 * x + x @ (-4.7750 * inner + 2.0315 * inner @ inner)
        else:
            x = 3.4445 * x + (-4.7750 * outer + 2.0315 * outer @ outer) @ x
    return x


class Several:
    """Optimizers of different parameters as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self._optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        """Step all."""
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Forget the gradients of all."""
        for optimizer in self._optimizers:
            optimizer.zero_grad()


def train(job: dict[str, Any]) -> None:
    """Load, take the steps and write what came out."""
    output = Path(job["output"])
    output.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, attn_implementation=job["attention"]
    ).train()
    if job.get("groups") is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in job["groups"])
    optimizer = make_optimizer(model, job["optimizer"], job.get("groups"), job.get("orthogonal") or [])
    batches = load_file(job["batches"])
    steps: list[list[float]] = []
    for step, rate in enumerate(job["learning_rates"]):
        documents = batches["documents"][step] if "documents" in batches else None
        loss = backward(model, batches["tokens"][step], documents)
        if getattr(model.config, "output_router_logits", False):
            balance(model, batches["tokens"][step], documents, job.get("micro_size", 1))
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norm = nn.utils.get_total_norm(gradients.values()).item()
        steps.append([loss, norm])
        if step == 0:
            write(gradients, output / "gradients.safetensors")
        if job["clip_norm"]:
            nn.utils.clip_grad_norm_(model.parameters(), job["clip_norm"])
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("ratio", 1.0)
        optimizer.step()
        optimizer.zero_grad()
    write(dict(model.named_parameters()), output / "weights.safetensors")
    (output / "result.json").write_text(json.dumps({"steps": steps}))


def make_optimizer(
    model: PreTrainedModel, settings: dict[str, Any], groups: dict[str, list[float]] | None, orthogonal: list[str]
) -> torch.optim.Optimizer | Several:
    """Return torch's optimizer over every parameter, each with its own weight decay and learning-rate ratio."""
    settings = dict(settings)
    name = settings.pop("name")
    named = dict(model.named_parameters())
    made: dict[str, Any] = {
        key: {"params": [p], **({"weight_decay": groups[key][0], "ratio": groups[key][1]} if groups else {})}
        for key, p in named.items()
        if groups is None or key in groups
    }
    parameters: Any = list(made.values())
    if name == "muon":
        momentum = settings.pop("momentum")
        chosen = {k for k, p in named.items() if p.ndim >= 2 and any(re.fullmatch(e, k) for e in orthogonal)}
        matrices = [made[key] for key in made if key in chosen]
        others = [made[key] for key in made if key not in chosen]
        muon = Muon(matrices, {"lr": 0.0, "weight_decay": settings.get("weight_decay", 0.0), "momentum": momentum})
        return Several(muon, torch.optim.AdamW(others, lr=0.0, **settings))
    if name == "lion":
        return Lion(parameters, {"lr": 0.0, "weight_decay": 0.0, **settings})
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "adagrad": torch.optim.Adagrad}[name]
    return kind(parameters, lr=0.0, **settings)


def backward(model: PreTrainedModel, tokens: torch.Tensor, documents: torch.Tensor | None) -> float:
    """Accumulate the gradient of the mean loss over all target tokens, one sequence or document at a time."""
    pairs = list(sequences(tokens, documents))
    count = sum(len(targets) for _, targets in pairs)
    total = 0.0
    for inputs, targets in pairs:
        logits = model(input_ids=inputs[None], use_cache=False).logits[0]
        loss = nn.functional.cross_entropy(logits.float(), targets, reduction="sum") / count
        loss.backward()
        total += loss.item()
    return total


def balance(model: PreTrainedModel, tokens: torch.Tensor, documents: torch.Tensor | None, micro_size: int) -> None:
    """Accumulate the gradient of the load-balancing loss of a mixture of experts, a mean over micro-batches.

    Routers see every document alone, the loss sees what they say of the whole micro-batch.
    """
    of_logits = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    if of_logits is None:
        return
    groups = tokens[:, :-1].split(micro_size)
    for number, rows in enumerate(groups):
        if documents is None:
            loss = model(input_ids=rows, use_cache=False).aux_loss
        else:
            numbers = documents[number * micro_size :][: len(rows)]
            lengths = [numbers[i].unique_consecutive(return_counts=True)[1].tolist() for i in range(len(rows))]
            parts = [part for row, pieces in zip(rows, lengths, strict=True) for part in row.split(pieces)]
            said = [model(input_ids=part[None], use_cache=False).router_logits for part in parts]
            joined = tuple(torch.cat(logits) for logits in zip(*said, strict=True))
            loss = of_logits(joined, model.num_experts, model.num_experts_per_tok)
        (model.config.router_aux_loss_coef * loss / len(groups)).backward()


def sequences(tokens: torch.Tensor, documents: torch.Tensor | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (inputs, targets) of every sequence, or of every document alone: none sees another."""
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for number, row in enumerate(tokens):
        if documents is None:
            pairs.append((row[:-1], row[1:]))
            continue
        length = len(documents[number])
        for document in documents[number].unique_consecutive():
            places = (documents[number] == document).nonzero().flatten()
            first, last = int(places[0]), int(places[-1])
            # The last token of a document predicts nothing, but at the end of the row the next one is known.
            end = last + 1 if last + 1 == length else last
            if end > first:
                pairs.append((row[first:end], row[first + 1 : end + 1]))
    return pairs


def write(tensors: dict[str, Any], path: Path) -> None:
    """Write tensors as safetensors."""
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(json.loads(Path(sys.argv[1]).read_text()))
