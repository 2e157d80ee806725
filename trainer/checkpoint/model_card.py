"""README.md of an export: where the weights come from, in a form that people and the Hugging Face Hub read."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml

from trainer.checkpoint import layout
from trainer.config.yaml_text import dump_yaml
from trainer.core.redact import redacted

CARD_NAME = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_METRICS_BYTES = 2**30


def checkpoint_digest(directory: Path) -> str:
    """Return the SHA-256 of a checkpoint's manifest, which names the hash of every other file. Raises OSError."""
    return hashlib.sha256(layout.manifest_path(directory).read_bytes()).hexdigest()


def model_card(
    run_directory: Path, directory: Path, manifest: Mapping[str, Any], dtype: str, *, trained: bool = False
) -> str:
    """Return the card of an export in ``dtype``; with ``trained`` of one that holds the trained tensors alone."""
    recipe = _recipe(run_directory, manifest)
    base = _mapping(recipe.get("model")).get("path") if recipe else None
    text = [_front_matter(base), f"# {_title(recipe, run_directory)}\n"]
    text.append(_start(base, manifest) + "\n")
    text.append(_table(_facts(run_directory, directory, manifest, dtype)))
    text.append("## Load\n\n" + (_load_trained(base, manifest) if trained else _LOAD))
    if recipe:
        text.append("## Recipe\n\nResolved, defaults included.\n\n" + _fenced("yaml", dump_yaml(recipe)))
    text.append("## Model config\n\n" + _fenced("json", json.dumps(_model(manifest).get("config"), indent=2)))
    return "\n".join(text)


def _front_matter(base: object) -> str:
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["trainer"]}
    # A path of this machine is no name to anybody else, and the Hub refuses it.
    if isinstance(base, str) and _HUB_ID.fullmatch(base) and ".." not in base and not Path(base).exists():
        fields["base_model"] = base
    return "---\n" + yaml.safe_dump(fields, sort_keys=False) + "---\n"


def _title(recipe: Mapping[str, Any] | None, run_directory: Path) -> str:
    name = _mapping(recipe.get("run")).get("name") if recipe else None
    return str(name or run_directory.resolve().name).replace("\n", " ")


def _start(base: object, manifest: Mapping[str, Any]) -> str:
    family = _mapping(_model(manifest).get("config")).get("model_type")
    if (source := manifest.get("imported")) is not None:
        return f"A causal language model of the family `{family}`, not trained by `trainer`: imported from {source}."
    if base is None:
        return f"A causal language model of the family `{family}`, trained from scratch by `trainer`."
    commit = _model(manifest).get("commit")
    return f"`{base}`{f' at commit `{commit}`' if commit else ''} (`{family}`), trained further by `trainer`."


def _load_trained(base: object, manifest: Mapping[str, Any]) -> str:
    """Return how to put the trained tensors into the base model, which plain transformers can't load from a run."""
    text = _LOAD_TRAINED.replace("DTYPE", str(_model(manifest).get("dtype")))
    if not isinstance(base, str) or not layout.checkpoints_directory(Path(base)).is_dir():
        return text
    command = f"trainer export {shlex.quote(str(Path(base).resolve()))} --output BASE_DIR"
    first = "The base model is a run of `trainer`: export it first.\n\n" + _fenced("sh", command) + "\n"
    loaded = 'base["path"], revision=base["commit"] or base["revision"]'
    unread = 'base = json.load(open("PATH/trained.json"))["base_model"]\n'
    return first + text.replace(loaded, '"BASE_DIR"').replace(unread, "").replace("import json\n", "")


def _facts(run_directory: Path, directory: Path, manifest: Mapping[str, Any], dtype: str) -> list[tuple[str, Any]]:
    state = _mapping(manifest.get("state"))
    counters, identity = _mapping(state.get("train")), _mapping(state.get("identity"))
    train, validation = last_losses(run_directory, manifest["step"])
    facts: list[tuple[str, Any]] = [("step", manifest["step"]), ("tokens seen", counters.get("tokens"))]
    facts += [
        ("data fingerprint", identity.get("data.train")),
        ("sequence length", identity.get("data.sequence_length")),
    ]
    facts += [("train loss (nats/token)", train)]
    facts += [(f"validation loss, {name} (nats/token)", loss) for name, loss in validation.items()]
    facts += [("dtype of these weights", dtype), ("dtype of training", _model(manifest).get("dtype"))]
    topology = _mapping(manifest.get("topology"))
    facts += [("topology", ", ".join(f"{key} {value}" for key, value in topology.items()))] if topology else []
    facts += [(f"version of {name}", version) for name, version in _mapping(manifest.get("libraries")).items()]
    return [*facts, ("checkpoint digest (SHA-256 of manifest.json)", checkpoint_digest(directory))]


def last_losses(run_directory: Path, step: int) -> tuple[float | None, dict[str, float]]:
    """Return the last training loss, and the last of each validation source, up to ``step``; what is unknown is out."""
    train: float | None = None
    validation: dict[str, float] = {}
    path = run_directory / "metrics.jsonl"
    try:
        if path.stat().st_size > _METRICS_BYTES:
            return train, validation
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return train, validation
    for line in lines:
        try:
            fields = _mapping(json.loads(line))
        except (ValueError, RecursionError):  # a torn line
            continue
        at, loss = fields.get("step"), fields.get("loss", fields.get("validation_loss"))
        if not isinstance(at, int) or at > step or not isinstance(loss, float):
            continue
        if fields.get("kind") == "evaluation":
            validation[str(fields.get("name"))] = loss
        else:
            train = loss
    return train, validation


def _recipe(run_directory: Path, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the resolved recipe: the manifest's, or for checkpoints of before RUN/run.yaml's."""
    recipe: object = manifest.get("recipe")
    if recipe is None and manifest.get("imported") is not None:
        return None  # a run.yaml there is that of who trained on
    if recipe is None:
        try:
            recipe = yaml.safe_load((run_directory / "run.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return None
    return redacted(_mapping(recipe)) if isinstance(recipe, dict) else None


def _model(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return _mapping(manifest.get("model"))


def _mapping(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _table(rows: list[tuple[str, Any]]) -> str:
    lines = [f"| {key} | {_cell(value)} |" for key, value in rows]
    return "\n".join(["| fact | value |", "|---|---|", *lines]) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "unknown"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def _fenced(language: str, text: str) -> str:
    ticks = "`" * max(3, 1 + max((len(found) for found in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}\n"


_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH")  # where the run had a tokenizer
```
"""
_LOAD_TRAINED = """`trained.safetensors` holds the trained tensors alone. `trained.json` names the base model that
has the others, and the SHA-256 of those.

```python
import json
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

base = json.load(open("PATH/trained.json"))["base_model"]
model = AutoModelForCausalLM.from_pretrained(base["path"], revision=base["commit"] or base["revision"], dtype="DTYPE")
unknown = model.load_state_dict(load_file("PATH/trained.safetensors"), strict=False).unexpected_keys
assert not unknown
```
"""
