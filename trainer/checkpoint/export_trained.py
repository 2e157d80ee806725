"""Only what was trained, where the rest of the model stayed frozen: those tensors, and whose the others are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from trainer.checkpoint.assemble import checkpoint_tensor
from trainer.checkpoint.reader import CheckpointReader
from trainer.core.errors import CheckpointError, Problem, RefusedError

WEIGHTS_NAME, FACTS_NAME = "trained.safetensors", "trained.json"
_KEY = "--only-trained"


def trained_names(reader: CheckpointReader, manifest: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the trained and the frozen names. Raises RefusedError where there are not both, or no base model."""
    frozen: object = manifest.get("frozen")
    if not isinstance(frozen, list):
        raise RefusedError(Problem(_KEY, None, "the checkpoint does not say what was frozen", "export the whole model"))
    kept = sorted(set(cast("list[str]", frozen)) & set(reader.names()))
    trained = sorted(set(reader.names()) - set(kept))
    if not kept:
        raise RefusedError(Problem(_KEY, None, "nothing was frozen: every weight was trained", "leave it out"))
    if not trained:
        raise RefusedError(Problem(_KEY, None, "nothing was trained: every weight was frozen", "use the base model"))
    if _base(manifest).get("path") is None:
        rule = "the run started from no model, so that the frozen weights are nowhere else"
        raise RefusedError(Problem(_KEY, None, rule, "leave it out"))
    return trained, kept


def write_trained(
    reader: CheckpointReader, manifest: Mapping[str, Any], network: PreTrainedModel, target: Path
) -> None:
    """Write the trained tensors and their facts into ``target``, read them back and compare them.

    Needs memory for the model and for the trained tensors twice. Raises CheckpointError if anything differs.
    """
    trained, frozen = trained_names(reader, manifest)
    held = {**dict(network.named_buffers()), **dict(network.named_parameters())}
    target.mkdir(parents=True)
    save_file({name: held[name].detach().contiguous() for name in trained}, target / WEIGHTS_NAME, {"format": "pt"})
    run_dtype = getattr(torch, reader.model["dtype"])
    digest = tensors_digest(frozen, lambda name: checkpoint_tensor(reader, name, held[name]).to(run_dtype))
    base = {**_base(manifest), "dtype": reader.model["dtype"], "frozen_sha256": digest, "frozen": frozen}
    facts = {
        "format": "trainer-trained-weights",
        "version": 1,
        "base_model": base,
        "trained": trained,
        "dtype": str(next(network.parameters()).dtype).removeprefix("torch."),
        "step": manifest["step"],
    }
    (target / FACTS_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    found = load_file(target / WEIGHTS_NAME)
    if found.keys() != set(trained):
        raise CheckpointError(f"export refused: {WEIGHTS_NAME} holds other tensors than were trained")
    for name in trained:
        if not torch.equal(checkpoint_tensor(reader, name, found[name]), found[name]):
            raise CheckpointError(f"export refused: {name} differs after reloading")
    _refuse_other_base(base, frozen)


def tensors_digest(names: Iterable[str], tensor: Callable[[str], torch.Tensor]) -> str:
    """Return the SHA-256 over name, dtype, shape (as compact JSON) and little-endian bytes of each tensor, sorted."""
    digest = hashlib.sha256()
    for name in sorted(names):
        values = tensor(name).detach().cpu().contiguous()
        head = [name, str(values.dtype).removeprefix("torch."), list(values.shape)]
        digest.update(json.dumps(head, separators=(",", ":")).encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _base(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return path, revision and commit of the model that the run started from."""
    recipe: dict[str, Any] = manifest.get("recipe") or {}
    section: dict[str, Any] = recipe.get("model") or {}
    facts = {key: section.get(key) for key in ("path", "revision")}
    return {**facts, "commit": manifest["model"].get("commit")}


def _refuse_other_base(base: Mapping[str, Any], frozen: list[str]) -> None:
    """Raise CheckpointError where the base model lies on this machine and has other frozen weights."""
    path = Path(base["path"])
    if not (path / "config.json").is_file():
        return
    loaded = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, base["dtype"]), use_safetensors=True, trust_remote_code=False
    )
    held = {**dict(loaded.named_buffers()), **dict(loaded.named_parameters())}
    missing = [name for name in frozen if name not in held]
    if missing or tensors_digest(frozen, held.__getitem__) != base["frozen_sha256"]:
        what = f"lacks {missing[0]}" if missing else "has other weights than the frozen ones"
        raise CheckpointError(f"export refused: the base model {path} {what}; export the whole model")
