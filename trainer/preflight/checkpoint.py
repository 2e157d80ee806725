"""Rules about the run directory and its checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.checkpoint.changes import pattern_error, training_changes
from trainer.checkpoint.layout import FORMAT, VERSION
from trainer.config.model import ModelConfig
from trainer.core.errors import DataError, Problem
from trainer.preflight.facts import Facts, Failing, Rule


def _directory(facts: Facts) -> Iterator[Problem]:
    text = facts.recipe.run.directory
    if not text.strip():
        yield Problem("run.directory", text, "is empty", "name a directory, e.g. runs/first")
        return
    path = Path(text)
    try:
        if path.exists() and not path.is_dir():
            yield Problem("run.directory", text, "is a file", "name a directory")
            return
        ancestor = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    except (OSError, ValueError) as error:
        yield Problem("run.directory", text, f"can't be used: {error}", "name a directory")
        return
    if not ancestor.is_dir():
        yield Problem("run.directory", text, f"{ancestor} is a file", "name a directory that can be made")
    elif not os.access(ancestor, os.W_OK | os.X_OK):
        yield Problem(
            "run.directory", text, f"{ancestor} is not writable", "choose another directory or ask for rights"
        )


def _multiple(facts: Facts) -> Iterator[Problem]:
    every, keep = facts.recipe.checkpoint.every_steps, facts.recipe.checkpoint.keep_every_steps
    if every is not None and keep is not None and keep % every:
        rule = f"is no multiple of checkpoint.every_steps = {every}, so nothing would be kept by it"
        below = keep - keep % every
        fix = "use " + " or ".join(str(steps) for steps in (below, below + every) if steps)
        yield Problem("checkpoint.keep_every_steps", keep, rule, fix)


def _rewind(facts: Facts) -> Iterator[Problem]:
    guard = facts.recipe.resilience.guard
    if "rewind" in (guard.on_nan, guard.on_spike) and facts.recipe.checkpoint.every_steps is None:
        rule = "is null: resilience.guard would have no checkpoint to go back to"
        yield Problem("checkpoint.every_steps", None, rule, "set it to a number of steps")


def _hook(facts: Facts) -> Iterator[Problem]:
    command = facts.recipe.checkpoint.hook
    if command is not None and (not command or shutil.which(command[0]) is None):
        rule = "its first word is no program that can be run"
        yield Problem("checkpoint.hook", list(command), rule, "name one on PATH, or its path")


def _resume(facts: Facts) -> Iterator[Problem]:
    resume, directory = facts.recipe.checkpoint.resume, Path(facts.recipe.run.directory)
    try:
        # A directory without a manifest is not a checkpoint.
        found = sorted(path.parent.name for path in directory.glob("checkpoints/step-*/manifest.json"))
    except (OSError, ValueError):
        return
    if resume == "require" and not found:
        rule = f"there is no checkpoint in {directory / 'checkpoints'}"
        yield Problem("checkpoint.resume", resume, rule, "set it to auto, or correct run.directory")
    if resume == "never" and found:
        rule = f"{directory} already has checkpoints, the newest is {found[-1]}"
        yield Problem("checkpoint.resume", resume, rule, "choose another run.directory, or set it to auto to continue")


def _identity(facts: Facts) -> Iterator[Problem]:
    """The newest checkpoint was written by a run that read the same data in the same order, with the same shapes."""
    recipe = facts.recipe
    if facts.resumed is None:
        return
    where, manifest = facts.resumed
    # Imported here: NumPy takes a quarter of the time that `check` has, and only a resume needs it.
    from trainer.checkpoint.identity import data_differences, data_identity, model_differences
    from trainer.data.sampler import Sampler
    from trainer.data.sources import open_train_sources

    state, model = manifest.get("state", {}), manifest.get("model", {})
    if recipe.model.path is None and recipe.model.config is not None:
        yield from model_differences(*_compared_configs(model, recipe.model), where)
    if "data" in recipe.checkpoint.accepted:
        return
    try:
        sources = open_train_sources(recipe.data, None)
        fingerprints = [source.shards.fingerprint for source in sources]
        sampler = Sampler(recipe.data, recipe.run.seed, fingerprints, [s.packing.num_samples for s in sources])
        fingerprint = sampler.fingerprint(state.get("train", {}).get("consumed_samples", 0))
    except (DataError, OSError):  # the rules of data.train say why
        return
    yield from data_differences(state.get("identity", {}), data_identity(recipe, fingerprint), where)


def _compared_configs(stored: Mapping[str, Any], wanted: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return both configs as they are compared: vocabularies as they are padded, or as asked for if those differ."""
    before, now = dict(stored.get("config", {})), dict(wanted.config or {})
    unpadded, size = stored.get("unpadded_vocabulary_size"), now.get("vocab_size")
    if unpadded not in (None, size):
        before["vocab_size"] = unpadded
    elif wanted.vocabulary_multiple and type(size) is int:
        now["vocab_size"] = -(-size // wanted.vocabulary_multiple) * wanted.vocabulary_multiple
    return before, now


def _format(facts: Facts) -> Iterator[Problem]:
    """A checkpoint that a newer trainer wrote is not guessed at."""
    if facts.resumed is None:
        return
    where, manifest = facts.resumed
    version: object = manifest.get("version")
    if type(version) is int and version > VERSION:
        rule = f"{where} has format version {version}, this trainer reads up to {VERSION}"
        fix = "upgrade the trainer, or use another run.directory"
        yield Problem("run.directory", facts.recipe.run.directory, rule, fix)


def _training(facts: Facts) -> Iterator[Problem]:
    """The newest checkpoint was trained by the same optimizer, with the same parameters frozen."""
    recipe = facts.recipe
    if facts.resumed is None or pattern_error((*recipe.model.freeze, *(g.pattern for g in recipe.optimizer.groups))):
        return
    where, manifest = facts.resumed
    changes, accepted = training_changes(manifest, recipe, where), recipe.checkpoint.accepted
    if "optimizer" not in accepted:
        yield from changes.optimizer
    if "frozen" not in accepted:
        yield from changes.frozen


def _file(tmp: Path) -> dict[str, Any]:
    (tmp / "file").write_text("", encoding="utf-8")
    return {"run.directory": str(tmp / "file")}


def _below_file(tmp: Path) -> dict[str, Any]:
    return {"run.directory": _file(tmp)["run.directory"] + "/run"}


def _checkpoint(tmp: Path) -> dict[str, Any]:
    step = tmp / "old" / "checkpoints" / "step-00000005"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text("{}", encoding="utf-8")
    return {"run.directory": str(tmp / "old"), "checkpoint.resume": "never"}


def _written(tmp: Path, **fields: Any) -> dict[str, Any]:
    """Write a checkpoint without tensors, its manifest changed by ``fields``."""
    step = tmp / "old" / "checkpoints" / "step-00000005"
    step.mkdir(parents=True)
    (step / "rank-00000.safetensors").write_bytes(b"")
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "step": 5,
        "files": {"rank-00000.safetensors": {"bytes": 0, "xxh3_64": "0" * 16}},
        "state": {"identity": {}},
        "model": {"config": {}},
    }
    (step / "manifest.json").write_text(json.dumps(manifest | fields), encoding="utf-8")
    return {"run.directory": str(tmp / "old")}


def _another_run(tmp: Path) -> dict[str, Any]:
    return _written(tmp, state={"identity": {"run.seed": 987654}})


def _another_padding(tmp: Path) -> dict[str, Any]:
    overrides = _written(tmp, model={"config": {"model_type": "llama", "vocab_size": 100}})
    fields = {"model.config": {"model_type": "llama", "vocab_size": 100}, "model.vocabulary_multiple": 64}
    return overrides | fields | {"checkpoint.accept_changes": ["data"]}


def _newer_format(tmp: Path) -> dict[str, Any]:
    return _written(tmp, version=VERSION + 1)


def _trained(tmp: Path, frozen: tuple[str, ...] = ()) -> dict[str, Any]:
    """AdamW trained an embedding and a norm, less what was frozen."""
    moments: dict[str, Any] = {"exp_avg": {}, "exp_avg_sq": {}}
    shapes = {"model.embed_tokens.weight": [64, 16], "model.norm.weight": [16]}
    tensors: dict[str, Any] = {
        name: {"shape": shape, "states": {"weight": {}} | ({} if name in frozen else moments)}
        for name, shape in shapes.items()
    }
    return _written(tmp, tensors=tensors, optimizer={"name": "adamw"}, frozen=list(frozen))


def _trained_with_frozen(tmp: Path) -> dict[str, Any]:
    return _trained(tmp, ("model.norm.weight",))


RULES = (
    Rule("run directory named", _directory, Failing({"run.directory": " "})),
    Rule("run directory is none of the files", _directory, Failing(prepare=_file)),
    Rule("run directory can be made", _directory, Failing(prepare=_below_file)),
    Rule("kept steps are saved", _multiple, Failing({"checkpoint.every_steps": 2, "checkpoint.keep_every_steps": 3})),
    Rule("a rewind has checkpoints", _rewind, Failing({"resilience.guard.on_spike": "rewind"})),
    Rule("hook can be run", _hook, Failing({"checkpoint.hook": ["no-such-program"]})),
    Rule("resume finds a checkpoint", _resume, Failing({"checkpoint.resume": "require"})),
    Rule("a resume reads the same data into the same model", _identity, Failing(prepare=_another_run)),
    Rule("a resume pads the vocabulary alike", _identity, Failing(prepare=_another_padding)),
    Rule("a resume by the same optimizer", _training, Failing({"optimizer.name": "lion"}, prepare=_trained)),
    Rule("a resume with the same parameters frozen", _training, Failing({"model.freeze": ["norm"]}, prepare=_trained)),
    Rule("a resume with the same parameters trained", _training, Failing(prepare=_trained_with_frozen)),
    Rule("a checkpoint of a format we know", _format, Failing(prepare=_newer_format)),
    Rule("a fresh run is fresh", _resume, Failing(prepare=_checkpoint)),
)
