"""What a checkpoint says about the run that wrote it, beside tensors and counters."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from trainer.config.run import Recipe
from trainer.core.redact import redacted
from trainer.parallel.topology import Topology

LIBRARIES = ("trainer", "torch", "deepspeed", "transformers")


def provenance(
    recipe: Recipe, mesh: Topology, zero_stage: int, num_nodes: int, parameters: Iterable[str]
) -> dict[str, Any]:
    """Return the manifest's fields about topology, libraries, recipe, optimizer and frozen ``parameters``."""
    resolved = redacted(recipe.model_dump(mode="json"))
    return {
        "topology": {**topology_facts(mesh, recipe.parallel.expert, zero_stage), "nodes": num_nodes},
        "libraries": library_versions(),
        "recipe": resolved,
        "recipe_digest": recipe_digest(resolved),
        "optimizer": {"name": recipe.optimizer.name},
        "frozen": frozen_names(parameters, recipe.model.freeze),
        "created_unix": time.time(),
    }


def recipe_digest(resolved: dict[str, Any]) -> str:
    """Return the SHA-256 of a resolved recipe in canonical JSON: the same recipe has the same digest anywhere."""
    return hashlib.sha256(json.dumps(resolved, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def frozen_names(parameters: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Return the names of parameters that a recipe's ``model.freeze`` keeps as they are, sorted."""
    found = [re.compile(pattern) for pattern in patterns]
    return sorted(name for name in parameters if any(pattern.search(name) for pattern in found))


def topology_facts(mesh: Topology, expert: int, zero_stage: int) -> dict[str, int]:
    """Return how ranks share the work, as a manifest says it."""
    return {
        "world_size": mesh.world_size,
        "pipeline": mesh.pipeline,
        "tensor": mesh.tensor,
        "sequence": mesh.sequence,
        "expert": expert,
        "data": mesh.data,
        "zero_stage": zero_stage,
    }


def library_versions() -> dict[str, str | None]:
    """Return the versions of the libraries that decide what a step computes, None where one is not installed."""
    return {name: _version(name) for name in LIBRARIES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
