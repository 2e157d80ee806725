"""How far what ranks computed is from the reference."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

SMALLEST_GRADIENT = 1e-5
"""As a share of the whole gradient's norm. A parameter whose gradient is smaller (a key bias: softmax cancels it) is
nothing but rounding; its error is measured against this."""


@dataclass(frozen=True)
class Deviations:
    """Between a directory of ``rank.py`` and one of ``reference.py``."""

    losses: tuple[tuple[float, float], ...]
    """(ours, reference) a step."""
    norms: tuple[tuple[float, float], ...]
    """Gradient norms, (ours, reference) a step."""
    gradients: dict[str, float] | None
    """Relative deviation of each parameter's gradient; None where the optimizer's state does not tell it."""
    weight: float
    """Largest absolute deviation of a weight after the last step."""
    missing: tuple[str, ...]
    """Parameters that only the reference has."""

    @property
    def worst_gradient(self) -> tuple[str, float]:
        """The parameter whose gradient deviates most, and by how much."""
        found = self.gradients or {}
        name = max(found, key=lambda key: found[key], default="")
        return name, found.get(name, 0.0)


def compare(reference: Path, ours: Path) -> Deviations:
    """Read both directories."""
    expected = json.loads((reference / "result.json").read_text())["steps"]
    found = json.loads((ours / "result.json").read_text())["steps"]
    weights, mine = load_file(reference / "weights.safetensors"), load_file(ours / "weights.safetensors")
    # Persistent buffers are state of ours too; parameters are what is compared.
    shared = [name for name in weights if name in mine]
    pairs = list(zip(found, expected, strict=True))
    return Deviations(
        losses=tuple((a[0], b[0]) for a, b in pairs),
        norms=tuple((a[1], b[1]) for a, b in pairs),
        gradients=_gradients(reference, ours, list(weights)),
        weight=max(((mine[name] - weights[name]).abs().max().item() for name in shared), default=0.0),
        missing=tuple(name for name in weights if name not in mine),
    )


def _gradients(reference: Path, ours: Path, names: list[str]) -> dict[str, float] | None:
    path = ours / "gradients.safetensors"
    if not path.exists():
        return None
    right, mine = load_file(reference / "gradients.safetensors"), load_file(path)
    whole = torch.stack([gradient.double().norm() for gradient in right.values()]).norm().item()
    deviations: dict[str, float] = {}
    for name in names:
        here, there = mine.get(name), right.get(name)
        if here is None and there is None:
            continue
        size = there.double().norm().item() if there is not None else 0.0
        zero = torch.zeros(())
        difference = ((here if here is not None else zero) - (there if there is not None else zero)).double().norm()
        deviations[name] = difference.item() / max(size, SMALLEST_GRADIENT * whole)
    return deviations
