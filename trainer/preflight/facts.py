"""What rules judge, and what a rule is."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from trainer.checkpoint.layout import newest, read_manifest, step_directories
from trainer.config.deepspeed_file import read_deepspeed_file
from trainer.config.deepspeed_rules import value_at
from trainer.config.derive import Derived, derive, derive_problems
from trainer.config.model_fields import ModelFields, model_fields
from trainer.config.run import Recipe
from trainer.core.errors import Problem
from trainer.preflight.shard_facts import ShardFacts, read_source

PACKAGES = ("torch", "deepspeed", "transformers")


def installed_versions() -> dict[str, str]:
    """Return the versions of the installed packages that matter, without importing them."""
    versions: dict[str, str] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # `trainer check` may run where nothing is trained
    return versions


def _config_of_run(directory: Path) -> dict[str, Any] | None:
    """Return the model's config where ``directory`` is another run, its vocabulary without padding."""
    found = newest(directory)
    manifest = read_manifest(found[1]) if found else None
    model = manifest.get("model") if manifest else None
    if not isinstance(model, dict) or not isinstance(cast("Any", model).get("config"), dict):
        return None
    facts = cast("dict[str, Any]", model)
    fields, unpadded = dict(facts["config"]), facts.get("unpadded_vocabulary_size")
    if isinstance(unpadded, int) and "vocab_size" in fields:
        fields["vocab_size"] = unpadded
    return fields


@dataclass(frozen=True)
class Facts:
    """A recipe, the ranks it is to run on, and what this machine knows about both. Costly facts are read once."""

    recipe: Recipe
    world_size: int
    versions: Mapping[str, str] = field(default_factory=installed_versions)
    python_optimizes: bool = bool(sys.flags.optimize)

    @cached_property
    def derived(self) -> Derived | None:
        """The derived numbers, or None where they can't be derived."""
        return None if derive_problems(self.recipe, self.world_size) else derive(self.recipe, self.world_size)

    @cached_property
    def deepspeed(self) -> Mapping[str, Any]:
        """The DeepSpeed JSON as given; empty where it can't be read."""
        file, _ = read_deepspeed_file(self.recipe.deepspeed.base, self.recipe.deepspeed.override)
        return file.values if file else {}

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage."""
        stage = value_at(self.deepspeed, "zero_optimization.stage")
        return stage if isinstance(stage, int) else 0

    @cached_property
    def model(self) -> ModelFields:
        """The fields of the model's config, as far as they are known offline."""
        model = self.recipe.model
        fields = _config_of_run(Path(model.path)) if model.path is not None else None
        if fields is None:
            return model_fields(model)
        return model_fields(model.model_copy(update={"path": None, "config": fields | (model.config or {})}))

    @cached_property
    def resumed(self) -> tuple[str, Mapping[str, Any]] | None:
        """Name and manifest of the checkpoint that a start would continue from, if there is one."""
        if self.recipe.checkpoint.resume == "never":
            return None
        directory = Path(self.recipe.run.directory)
        found = newest(directory) or next(reversed(step_directories(directory)), None)
        manifest = read_manifest(found[1]) if found else None
        return (found[1].name, manifest) if found and manifest is not None else None

    @cached_property
    def shards(self) -> tuple[tuple[str, ShardFacts], ...]:
        """(key of the recipe, facts) of every training and validation source."""
        data = self.recipe.data
        sources = [(f"data.train.{index}.path", source.path) for index, source in enumerate(data.train)]
        sources += [(f"data.validation.{index}.path", source.path) for index, source in enumerate(data.validation)]
        return tuple((key, read_source(path)) for key, path in sources)


@dataclass(frozen=True)
class Failing:
    """How to break a good recipe so that a rule must speak: every rule carries its own test."""

    overrides: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Dotted keys and values laid over a good recipe."""
    prepare: Callable[[Path], Mapping[str, Any]] | None = None
    """Writes files below an empty directory and returns more overrides."""
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Fields of ``Facts`` that can't be reached from a recipe."""
    world_size: int = 2


@dataclass(frozen=True)
class Rule:
    """One thing that must hold across sections or between the recipe and this machine."""

    name: str
    check: Callable[[Facts], Iterable[Problem]]
    failing: Failing


NOT_AVAILABLE = "is not available in this version"
