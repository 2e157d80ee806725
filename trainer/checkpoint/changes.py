"""How a recipe trains otherwise than the run that wrote a checkpoint: another optimizer, other parameters frozen.

Told from the manifest alone and torch-free, so that ``check`` and a start refuse the same in the same words.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from trainer.checkpoint.provenance import frozen_names
from trainer.config.run import Recipe
from trainer.core.errors import Problem
from trainer.optim.groups import group_settings
from trainer.optim.table import TABLE

OPTIMIZER_FIX = (
    "restore it, use another run.directory (model.path = the old run starts from its weights), or set "
    "checkpoint.accept_changes: [optimizer] to keep weights and counters and start the optimizer afresh"
)
FROZEN_FIX = (
    "restore it, use another run.directory, or set checkpoint.accept_changes: [frozen]: parameters trained from now "
    "on start without optimizer state, those frozen from now on lose theirs"
)
_SHOWN_NAMES = 3
_PARAMETER_WORDS = ("weight", "bias")


@dataclass(frozen=True)
class Changes:
    """What is different, as problems and as names."""

    optimizer: tuple[Problem, ...] = ()
    frozen: tuple[Problem, ...] = ()
    newly_trained: frozenset[str] = frozenset()
    newly_frozen: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Tensor:
    num_dims: int
    keys: frozenset[str]
    """State keys without ``weight``: what the optimizer keeps. Empty for frozen parameters and buffers."""


def training_changes(
    manifest: Mapping[str, Any], recipe: Recipe, where: str, without_state: Collection[str] | None = None
) -> Changes:
    """Return how ``recipe`` trains otherwise than the checkpoint ``where`` was trained.

    ``without_state`` names the parameters trained from now on that the checkpoint holds no optimizer state of, where
    an engine can say so (None: not known). Only a manifest that does not name its frozen parameters needs it.
    """
    tensors = _tensors(manifest)
    newly_trained, newly_frozen = _frozen(manifest, recipe, tensors, without_state)
    trained = {name: tensor for name, tensor in tensors.items() if name not in newly_trained | newly_frozen}
    return Changes(
        tuple(_optimizer_problems(manifest, recipe, trained, where)),
        tuple(_frozen_problems(recipe, newly_trained, newly_frozen, where)),
        newly_trained,
        newly_frozen,
    )


def names_frozen(manifest: Mapping[str, Any]) -> bool:
    """Return whether the manifest says which parameters were frozen; those of older trainers don't."""
    return isinstance(manifest.get("frozen"), list)


def stateless_names(manifest: Mapping[str, Any]) -> set[str]:
    """Return the tensors that a checkpoint holds no optimizer state of: frozen parameters and buffers."""
    return {name for name, tensor in _tensors(manifest).items() if not tensor.keys}


def some_of(names: Iterable[str]) -> str:
    """Return the first few names and how many there are: "12 parameters (a, b, c and 9 more)"."""
    ordered = sorted(names)
    more = len(ordered) - _SHOWN_NAMES
    shown = ", ".join(ordered[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
    return f"{len(ordered)} parameter{'s' if len(ordered) != 1 else ''} ({shown})"


def _tensors(manifest: Mapping[str, Any]) -> dict[str, _Tensor]:
    """Return what the manifest says of each tensor; entries that make no sense are left to the reader's refusal."""
    found: dict[str, _Tensor] = {}
    entries: object = manifest.get("tensors")
    for name, entry in cast("dict[str, Any]", entries).items() if isinstance(entries, dict) else ():
        facts = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
        shape, states = facts.get("shape"), facts.get("states")
        if isinstance(shape, list) and isinstance(states, dict):
            keys = frozenset(cast("dict[str, Any]", states)) - {"weight"}
            found[name] = _Tensor(len(cast("list[Any]", shape)), keys)
    return found


def _frozen(
    manifest: Mapping[str, Any], recipe: Recipe, tensors: Mapping[str, _Tensor], without_state: Collection[str] | None
) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names that become trained, and those that become frozen."""
    now = set(frozen_names(tensors, recipe.model.freeze))
    stateless = {name for name, tensor in tensors.items() if not tensor.keys}
    keeps_state = len(stateless) < len(tensors)
    if names_frozen(manifest):
        before = {str(name) for name in manifest["frozen"]} & tensors.keys()
        buffers = stateless - before if keeps_state else set[str]()
        return frozenset(before - now), frozenset(now - before - buffers)
    if not keeps_state:  # SGD without momentum: nothing tells, and nothing depends on it
        return frozenset(), frozenset()
    if without_state is None:  # buffers have no state either, but other names than modules give their parameters
        without_state = {name for name in stateless if name.rpartition(".")[2] in _PARAMETER_WORDS}
    return frozenset((stateless & set(without_state)) - now), frozenset(now - stateless)


def _frozen_problems(
    recipe: Recipe, newly_trained: Collection[str], newly_frozen: Collection[str], where: str
) -> Iterable[Problem]:
    changed = [
        f"{some_of(names)} {'becomes' if len(names) == 1 else 'become'} {what}"
        for names, what in ((newly_trained, "trained"), (newly_frozen, "frozen"))
        if names
    ]
    if changed:
        rule = f"{where} was trained with others frozen: {', '.join(changed)}"
        yield Problem("model.freeze", list(recipe.model.freeze), rule, FROZEN_FIX)


def _optimizer_problems(
    manifest: Mapping[str, Any], recipe: Recipe, tensors: Mapping[str, _Tensor], where: str
) -> Iterable[Problem]:
    config, spec = recipe.optimizer, TABLE[recipe.optimizer.name]
    keeps_state = any(tensor.keys for tensor in tensors.values())
    frozen = set(frozen_names(tensors, recipe.model.freeze))
    different: list[str] = []
    held, wanted = set[str](), set[str]()
    for name, tensor in tensors.items():
        if name in frozen or (keeps_state and not tensor.keys):  # frozen then and now, or a buffer
            continue
        orthogonal = group_settings(name, tensor.num_dims, config).orthogonal
        needed = frozenset(spec.torch_state_keys(config, orthogonal))
        held, wanted = held | tensor.keys, wanted | needed
        if needed != tensor.keys:
            different.append(name)
    said: object = manifest.get("optimizer")
    name = cast("dict[str, Any]", said).get("name") if isinstance(said, dict) else None
    if not different and name in (None, config.name):
        return
    before = name if isinstance(name, str) else _deduced(held)
    if wanted and not held and name not in (None, "sgd"):  # plain SGD is the only one that keeps nothing
        rule = f"{where} holds weights only, no state of an optimizer"
        yield Problem("optimizer.name", config.name, rule, OPTIMIZER_FIX)
    elif before != config.name:
        # Weights may have been imported without any.
        known = f"the state of {before} ({_keys(held)})" if held or name is not None else "no state of an optimizer"
        rule = f"{where} holds {known}, {config.name} keeps {_keys(wanted)}"
        yield Problem("optimizer.name", config.name, rule, OPTIMIZER_FIX)
    elif config.name == "sgd":
        rule = f"{where} holds {_keys(held)}, SGD keeps {_keys(wanted)} with it"
        yield Problem("optimizer.momentum", config.chosen_momentum, rule, OPTIMIZER_FIX)
    else:
        rule = f"{where} holds other state than {config.name} keeps of {some_of(different)}"
        yield Problem("optimizer.name", config.name, rule, OPTIMIZER_FIX)


def _keys(keys: Collection[str]) -> str:
    return ", ".join(sorted(keys)) or "no state"


def _deduced(keys: Collection[str]) -> str:
    """Return the optimizer that keeps such state."""
    kept = frozenset(keys)
    if "momentum" in kept:
        return "muon" if len(kept) > 1 else "sgd"
    named = {
        frozenset({"exp_avg", "exp_avg_sq"}): "adamw",
        frozenset({"exp_avg"}): "lion",
        frozenset({"sum"}): "adagrad",
    }
    return named.get(kept, "sgd" if not kept else "another optimizer")


def pattern_error(patterns: Iterable[str]) -> bool:
    """Return whether any of ``model.freeze`` is no regular expression: then nothing can be compared."""
    try:
        for pattern in patterns:
            re.compile(pattern)
    except re.error:
        return True
    return False
