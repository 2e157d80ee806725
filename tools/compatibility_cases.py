"""Run cases of the compatibility table against plain transformers, and compare."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from trainer.verification.compare import compare

TOOLS = Path(__file__).parent
STEPS, SEQUENCES, LENGTH = 3, 4, 16
LEARNING_RATE, MOMENTUM, NOISE = 1e-2, 0.9, 0.02
LOSS_BOUND, GRADIENT_BOUND, WEIGHT_BOUND = 1e-5, 1e-4, 1e-6


@dataclass(frozen=True)
class Case:
    """One family in one layout."""

    name: str
    config: dict[str, Any]
    world_size: int = 2
    recipe: dict[str, Any] = field(default_factory=dict[str, Any])
    """Sections of the recipe laid over the common one."""
    attention: str = "sdpa"
    packed: bool = False
    """Several documents a sequence, kept apart."""
    damage: str | None = None


@dataclass(frozen=True)
class Outcome:
    """Deviations from the reference, or why there are none."""

    loss: float = float("inf")
    """Absolute, of the first step."""
    gradient: float = float("inf")
    """Largest relative deviation of a parameter's gradient; NaN where the optimizer's state does not tell it."""
    weight: float = float("inf")
    """Largest absolute deviation of a weight after the last step."""
    initial: float = float("inf")
    """Largest absolute deviation of a weight initialised from scratch."""
    worst: str = ""
    """The parameter with that gradient."""
    error: str | None = None

    @property
    def numbers(self) -> tuple[str, str, str]:
        """Loss, gradient and weights, as shown."""
        gradient = "" if math.isnan(self.gradient) and self.worst == "" else f"{self.gradient:.1e}"
        return f"{self.loss:.1e}", gradient, f"{self.weight:.1e}"

    @property
    def passed(self) -> bool:
        """Whether all bounds hold."""
        untold = math.isnan(self.gradient) and self.worst == ""
        gradient = untold or self.gradient < GRADIENT_BOUND
        bounds = self.loss < LOSS_BOUND and gradient and self.weight < WEIGHT_BOUND
        return self.error is None and bounds and self.initial == 0.0


class Server:
    """A process that answers one JSON line with another."""

    def __init__(self, script: str, log: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(TOOLS / script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True,
        )  # fmt: skip

    def ask(self, job: dict[str, Any]) -> Any:
        """Return the answer. Raises RuntimeError if the process died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process ended")
        return json.loads(line)

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


class Bench:
    """Takes cases; the reference of a family is computed once."""

    def __init__(self, directory: Path, seed: int = 1) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.seed = seed
        self._reference = Server("compatibility_reference.py", directory / "reference.log")
        self._ranks = Server("compatibility_ranks.py", directory / "ranks.log")
        self._known: dict[str, tuple[Path, str | None]] = {}

    def close(self) -> None:
        """End the processes."""
        self._reference.close()
        self._ranks.close()

    def run(self, case: Case) -> Outcome:
        """Return how far a case is from the reference."""
        reference, error = self._reference_of(case)
        if error is not None:
            return Outcome(error=f"transformers itself: {error}")
        output = self.directory / "ours" / case.name.replace("/", "_").replace(" ", "-")
        output.mkdir(parents=True, exist_ok=True)
        for leftover in output.iterdir():
            leftover.unlink()
        job = {
            "recipe": self._recipe(case, reference / "model"), "world_size": case.world_size, "output": str(output),
            "batches": str(self._batches(case.packed)), "log": str(output / "log.txt"), "damage": case.damage,
            "from_scratch": case.config,
        }  # fmt: skip
        codes = self._ranks.ask(job)
        if any(codes):
            return Outcome(error=_first_error(output) or f"exit codes {codes}")
        return _compare(reference, output)

    def second_document_losses(self, case: Case) -> list[float]:
        """Return the loss of documents behind different first ones, one a first one. Raises RuntimeError."""
        reference, error = self._reference_of(case)
        output = self.directory / "documents" / case.name.replace(" ", "-")
        output.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(self.seed)
        tokens = torch.randint(3, 100, (1, SEQUENCES, LENGTH + 1), generator=generator).repeat(3, 1, 1)
        first = LENGTH // 3  # so that a boundary between sequence ranks is not one between documents
        tokens[1:, :, :first] = torch.randint(3, 100, (2, SEQUENCES, first), generator=generator)
        documents = (torch.arange(LENGTH) >= first).long().expand(3, SEQUENCES, LENGTH)
        save_file({"tokens": tokens, "documents": documents.contiguous()}, output / "batches.safetensors")
        job = {
            "recipe": self._recipe(case, reference / "model"), "world_size": case.world_size, "output": str(output),
            "batches": str(output / "batches.safetensors"), "log": str(output / "log.txt"), "damage": case.damage,
            "kind": "documents",
        }  # fmt: skip
        if error is not None or any(self._ranks.ask(job)):
            raise RuntimeError(error or _first_error(output))
        return json.loads((output / "documents.json").read_text())

    def _reference_of(self, case: Case) -> tuple[Path, str | None]:
        # Whole batches are the reference's, but where a loss is one of micro-batches.
        balanced = case.config.get("output_router_logits", False)
        micro_size = case.recipe.get("batch", {}).get("micro_size", 1) if balanced else 1
        key = json.dumps([case.config, case.packed, case.attention, self._optimizer(case), micro_size], sort_keys=True)
        if key not in self._known:
            path = self.directory / "reference" / f"{len(self._known)}-{case.config['model_type']}"
            job = {
                "config": case.config, "attention": case.attention, "seed": self.seed, "noise": NOISE,
                "output": str(path), "batches": str(self._batches(case.packed)),
                "micro_size": micro_size, **self._plain_optimizer(case),
            }  # fmt: skip
            self._known[key] = path, self._reference.ask(job)["error"]
        return self._known[key]

    def _optimizer(self, case: Case) -> dict[str, Any]:
        usual = {"name": "sgd", "momentum": MOMENTUM, "learning_rate": LEARNING_RATE, "weight_decay": 0.0}
        return {**(case.recipe.get("optimizer") or usual), "clip_norm": 0.0}

    def _plain_optimizer(self, case: Case) -> dict[str, Any]:
        settings = self._optimizer(case)
        clip_norm, rate = settings.pop("clip_norm"), settings.pop("learning_rate")
        if "epsilon" in settings:
            settings["eps"] = settings.pop("epsilon")
        return {
            "optimizer": settings, "clip_norm": clip_norm, "learning_rates": [rate] * STEPS,
            "orthogonal": [r".*\.\d+\..*"],  # Muon's: matrices of numbered blocks
        }  # fmt: skip

    def _recipe(self, case: Case, model: Path) -> dict[str, Any]:
        recipe: dict[str, Any] = {
            "run": {"directory": str(self.directory / "run"), "steps": STEPS, "seed": self.seed},
            "model": {"path": str(model), "dtype": "float32", "attention": case.attention},
            "data": {"train": [{"path": "unused"}], "sequence_length": LENGTH},
            "batch": {"global_size": SEQUENCES, "micro_size": 1},
            "deepspeed": {"base": "zero1"},
            "optimizer": self._optimizer(case),
            "schedule": {"name": "constant"},
            "launch": {"processes": case.world_size},
        }  # fmt: skip
        given = {name: section for name, section in case.recipe.items() if name != "optimizer"}
        return recipe | {name: recipe.get(name, {}) | section for name, section in given.items()}

    def _batches(self, packed: bool) -> Path:
        path = self.directory / ("packed.safetensors" if packed else "batches.safetensors")
        if not path.exists():
            generator = torch.Generator().manual_seed(self.seed)
            tensors = {"tokens": torch.randint(3, 100, (STEPS, SEQUENCES, LENGTH + 1), generator=generator)}
            if packed:
                edges = torch.rand((STEPS, SEQUENCES, LENGTH), generator=generator) < 0.25
                tensors["documents"] = edges.long().cumsum(dim=-1)
            save_file(tensors, path)
        return path


def _first_error(output: Path) -> str | None:
    """Return what the rank that failed first said: the others lose their connection to it."""
    errors = [path.read_text().strip() for path in sorted(output.glob("error-*.txt"))]
    own = [text for text in errors if "onnection" not in text] or errors
    return " ".join(own[0].split())[:300] if own else None


def _compare(reference: Path, ours: Path) -> Outcome:
    found = compare(reference, ours)
    if found.missing:
        return Outcome(error=f"parameters are missing: {', '.join(found.missing[:3])}")
    initial, mine = load_file(reference / "initial.safetensors"), load_file(ours / "initial.safetensors")
    name, worst = found.worst_gradient
    return Outcome(
        loss=abs(found.losses[0][0] - found.losses[0][1]),
        gradient=math.nan if found.gradients is None else worst,
        weight=found.weight,
        initial=max((mine[key] - tensor).abs().max().item() for key, tensor in initial.items()),
        worst=name,
    )
