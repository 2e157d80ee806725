"""Does this recipe compute what plain transformers computes? Asked of a small clone of the model, on real ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from trainer.config.derive import Derived
from trainer.config.run import Recipe
from trainer.core.errors import TrainerError
from trainer.data.loader import TrainLoader
from trainer.models.config import hugging_face_config
from trainer.optim.groups import group_settings
from trainer.optim.schedules import multiplier
from trainer.verification.compare import Deviations, compare
from trainer.verification.shrink import shrunk_config

LONGEST, MOST_ACCUMULATION, LARGEST_MICRO = 256, 4, 4
NOISE = 0.02
"""Added to the initial weights: some families start with zeros, whose gradients would prove nothing."""


@dataclass(frozen=True)
class Bounds:
    """What still counts as the same. bfloat16 rounds to 8 bits in every operation."""

    loss: float
    norm: float
    """Relative."""
    gradient: float
    """Relative, of every parameter."""


BOUNDS = {"float32": Bounds(1e-4, 1e-3, 1e-4), "bfloat16": Bounds(3e-2, 5e-2, 0.1)}


@dataclass(frozen=True)
class Verification:
    """What a verification found."""

    first: Deviations
    """One step of plain SGD, which tells every parameter's gradient."""
    steps: Deviations
    """Steps of the recipe's own optimizer."""
    bounds: Bounds

    @property
    def passed(self) -> bool:
        """Whether all bounds hold."""
        if self.first.missing or self.steps.missing or self.first.gradients is None:
            return False
        losses = all(abs(a - b) <= self.bounds.loss for a, b in self.steps.losses)
        norms = all(abs(a - b) <= self.bounds.norm * abs(b) for a, b in self.steps.norms)
        return losses and norms and self.first.worst_gradient[1] <= self.bounds.gradient


def verify(
    recipe: Recipe,
    derived: Derived,
    num_steps: int,
    directory: Path,
    run_ranks: Callable[[list[str], int], int],
) -> Verification:
    """Run ``num_steps`` steps of the recipe on a small clone and compare them with one plain process.

    ``run_ranks(command, number)`` starts ranks and returns their exit code. Raises TrainerError if they fail.
    """
    small = reduced(recipe, derived, num_steps)
    small["run"]["directory"] = str(directory / "run")  # state on NVMe must not mix with that of the run itself
    config = shrunk_config(
        hugging_face_config(recipe.model), recipe.parallel, small["data"]["sequence_length"], recipe.model.attention
    )
    model = directory / "model"
    names = _save_model(config, recipe, model)
    batches = directory / "batches.safetensors"
    _save_batches(Recipe.model_validate(small), derived, num_steps, batches)
    small["model"] = small["model"] | {
        "path": str(model), "config": None, "vocabulary_multiple": None, "vocabulary_size": None,
        "initialization": "huggingface", "revision": None,
    }  # fmt: skip
    plain = {
        "name": "sgd", "momentum": 0.9, "learning_rate": 1e-2, "weight_decay": 0.0, "clip_norm": 0.0, "groups": [],
    }  # fmt: skip
    cases = {"first": small | {"optimizer": plain, "schedule": {"name": "constant"}}, "steps": small}
    jobs = [_case(name, case, batches, directory) for name, case in cases.items()]
    (directory / "cases.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-W", "ignore", "-m", "trainer.verification.rank", str(directory / "cases.json")]
    code = run_ranks(command, derived.world_size)
    errors = sorted(directory.glob("*/error-*.txt"))
    if errors or code:
        own = [text for path in errors if "onnection" not in (text := path.read_text())]
        raise TrainerError((own or [f"the ranks ended with exit code {code}"])[0])
    for name, case in cases.items():
        _reference(name, Recipe.model_validate(case), derived, names, model, batches, directory)
    found = {name: compare(directory / f"{name}-reference", directory / name) for name in cases}
    return Verification(found["first"], found["steps"], BOUNDS[recipe.model.dtype])


def reduced(recipe: Recipe, derived: Derived, num_steps: int) -> dict[str, Any]:
    """Return the recipe with fewer and shorter sequences a step; everything that divides work over ranks stays."""
    fields = recipe.model_dump(mode="json")
    sequence = recipe.parallel.sequence
    length = min(recipe.data.sequence_length, LONGEST // sequence * sequence)
    micro = min(recipe.batch.micro_size, LARGEST_MICRO)
    accumulation = min(derived.accumulation, MOST_ACCUMULATION)
    fields["data"] |= {"sequence_length": length, "validation": [], "workers": 0}
    fields["batch"] = {"global_size": micro * accumulation * derived.data_parallel, "micro_size": micro}
    fields["run"] |= {"steps": max(num_steps, derived.total_steps), "tokens": None}
    return fields


def _case(name: str, recipe: dict[str, Any], batches: Path, directory: Path) -> dict[str, Any]:
    (directory / name).mkdir()
    return {"recipe": recipe, "batches": str(batches), "output": str(directory / name)}


def _save_model(config: PretrainedConfig, recipe: Recipe, path: Path) -> dict[str, int]:
    """Write a random model; return the number of dims of its trainable parameters."""
    torch.manual_seed(recipe.run.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * NOISE)
    model.save_pretrained(path)
    return {name: parameter.ndim for name, parameter in model.named_parameters()}


def _save_batches(recipe: Recipe, derived: Derived, num_steps: int, path: Path) -> None:
    """Read the first global batches of the recipe's data, as one rank."""
    config = hugging_face_config(recipe.model)
    loader = TrainLoader(
        recipe.data, recipe.run.seed, recipe.batch.global_size, recipe.batch.global_size, 0, 1, 0,
        config.get_text_config().vocab_size,
    )  # fmt: skip
    steps = [loader.next_step()[0] for _ in range(num_steps)]
    loader.close()
    last = [torch.where(batch.targets[:, -1:] < 0, 0, batch.targets[:, -1:]) for batch in steps]
    tensors = {"tokens": torch.stack([torch.cat([b.input_ids, end], 1) for b, end in zip(steps, last, strict=True)])}
    if recipe.data.mask_documents:
        tensors["documents"] = torch.stack([b.document_ids for b in steps if b.document_ids is not None])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _reference(
    name: str, recipe: Recipe, derived: Derived, names: dict[str, int], model: Path, batches: Path, directory: Path
) -> None:
    """Run the plain loop in a process of its own."""
    optimizer = recipe.optimizer
    keywords: dict[str, dict[str, Any]] = {
        "adamw": {"betas": optimizer.betas, "eps": optimizer.epsilon},
        "sgd": {"momentum": optimizer.chosen_momentum},
        "lion": {"betas": optimizer.betas},
        "adagrad": {"eps": optimizer.epsilon},
        "muon": {"betas": optimizer.betas, "eps": optimizer.epsilon, "momentum": optimizer.chosen_momentum},
    }

    def trained(key: str) -> bool:
        return not any(re.search(pattern, key) for pattern in recipe.model.freeze)

    settings = {key: group_settings(key, ndim, optimizer) for key, ndim in names.items() if trained(key)}
    with batches.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        num_steps = json.loads(file.read(length))["tokens"]["shape"][0]
    total = derived.total_steps if name == "steps" else num_steps
    job = {
        "model": str(model), "attention": recipe.model.attention, "batches": str(batches),
        "optimizer": {"name": optimizer.name, **keywords[optimizer.name]},
        "groups": {key: [s.weight_decay, s.learning_rate_ratio] for key, s in settings.items()},
        "micro_size": recipe.batch.micro_size,
        "orthogonal": [key for key, setting in settings.items() if setting.orthogonal],
        "clip_norm": optimizer.clip_norm, "output": str(directory / f"{name}-reference"),
        "learning_rates": [
            optimizer.learning_rate * multiplier(recipe.schedule, step + 1, total) for step in range(num_steps)
        ],
    }  # fmt: skip
    path = directory / f"{name}-reference.json"
    path.write_text(json.dumps(job))
    script = Path(__file__).with_name("reference.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(path)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    if done.returncode:
        raise TrainerError(f"plain transformers failed: {done.stderr.strip().splitlines()[-1:]}")
