"""What an export must hold before it is handed over: the checkpoint's weights, logits and tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from trainer.checkpoint.assemble import checkpoint_tensor
from trainer.checkpoint.reader import CheckpointReader
from trainer.core.errors import CheckpointError

PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b\n",
    "Grüße aus Zürich: 12,5 % mehr – 東京 🙂",
    " 3.14159 \t  two  spaces",
)
_MOST_TOKENS = 64


def prompts_of(model: PreTrainedModel, tokenizer: Any | None) -> list[list[int]]:
    """Return fixed token ids, and those of fixed texts where there is a tokenizer, as long as the model takes them."""
    text = model.config.get_text_config()
    longest = min(_MOST_TOKENS, getattr(text, "max_position_embeddings", None) or _MOST_TOKENS)
    ids = [[(7919 * (12 * row + i)) % text.vocab_size for i in range(12)] for row in range(2)]
    ids += [token_ids(tokenizer, prompt) for prompt in PROMPTS] if tokenizer is not None else []
    return [row[:longest] for row in ids if row]


def token_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Return the ids of ``prompt``."""
    return list(tokenizer(prompt)["input_ids"])


def logits_of(model: PreTrainedModel, prompts: Iterable[list[int]]) -> list[torch.Tensor]:
    """Return the logits of each prompt [1, tokens, vocabulary]. Raises CheckpointError where they are NaN or Inf."""
    found: list[torch.Tensor] = []
    with torch.inference_mode():
        for ids in prompts:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
            if not bool(logits.isfinite().all()):
                raise CheckpointError(
                    f"export refused: logits are not finite in {logits.dtype}; choose another --dtype"
                )
            found.append(logits)
    return found


def refuse_unlike(
    reader: CheckpointReader,
    directory: Path,
    prompts: list[list[int]],
    expected: list[torch.Tensor],
    tokenizer: Any | None,
) -> None:
    """Raise CheckpointError unless plain transformers finds the checkpoint in ``directory``.

    Every weight equals the checkpoint's own after the cast, the prompts have the ``expected`` logits, and the exported
    tokenizer gives the texts the ids that the run's ``tokenizer`` gives.
    """
    loaded = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", use_safetensors=True, trust_remote_code=False
    ).eval()
    _refuse_other_weights(reader, loaded)
    _refuse_doubled(loaded, directory)
    if tokenizer is not None:
        exported = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        for prompt in PROMPTS:
            wanted, found = token_ids(tokenizer, prompt), token_ids(exported, prompt)
            if wanted != found:
                raise CheckpointError(f"export refused: {prompt!r} has other tokens: {found[:9]}, not {wanted[:9]}")
    for here, there in zip(expected, logits_of(loaded, prompts), strict=True):
        if not torch.equal(here, there):
            raise CheckpointError(f"export refused: logits differ by {(here - there).abs().max():.3g} after reloading")


def written_tensors(directory: Path) -> dict[str, Path]:
    """Return the file of each tensor in the safetensors of ``directory``. Raises CheckpointError if one is in two."""
    found: dict[str, Path] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name in found:
                    raise CheckpointError(f"export refused: {name} is in {found[name].name} and in {path.name}")
                found[name] = path
    return found


def _refuse_other_weights(reader: CheckpointReader, loaded: PreTrainedModel) -> None:
    found = dict(loaded.named_parameters())
    held = reader.names()
    buffers = {name: buffer for name, buffer in loaded.named_buffers() if name in set(held)}
    wrong = sorted(set(held) ^ (found.keys() | buffers.keys()))
    for name in held:
        if name not in wrong:
            tensor = found.get(name, buffers.get(name))
            assert tensor is not None
            if not torch.equal(checkpoint_tensor(reader, name, tensor), tensor):
                wrong.append(name)
    if wrong:
        raise CheckpointError(f"export refused: weights differ after reloading: {', '.join(wrong[:5])}")


def _refuse_doubled(loaded: PreTrainedModel, directory: Path) -> None:
    """Raise CheckpointError if a tied weight was written under more than one of its names, or the index is wrong."""
    written = written_tensors(directory)
    names: dict[int, list[str]] = {}
    for name, parameter in loaded.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for tied in names.values():
        if len(both := [name for name in tied if name in written]) > 1:
            raise CheckpointError(f"export refused: a tied weight was written twice: {', '.join(both)}")
    index = directory / "model.safetensors.index.json"
    if index.exists():
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if listed != {name: path.name for name, path in written.items()}:
            raise CheckpointError("export refused: model.safetensors.index.json does not list what the files hold")
