"""Load pretrained weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from trainer.config.model import ModelConfig
from trainer.core.errors import Problem, RefusedError
from trainer.core.hub import unreachable


def load_model(path: str, key: str) -> Any:
    """Return the causal LM of a directory or Hugging Face id, in its own dtype, dropout off; no code of its own is run.

    Raises RefusedError, naming ``key``, if transformers can't load it.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", use_safetensors=True, trust_remote_code=False, local_files_only=unreachable(path)
        ).eval()
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fix = "give what `trainer export` wrote, or a Hugging Face id"
        raise RefusedError(Problem(key, path, f"can't be loaded as a model ({reason})", fix)) from error


def loading_options(model: ModelConfig) -> dict[str, Any]:
    """Return the keyword arguments of ``from_pretrained`` for training."""
    return {
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "attn_implementation": model.attention,
        "local_files_only": unreachable(model.path or ""),
        "dtype": getattr(torch, model.dtype),
        "use_safetensors": True,  # pickled weights run code on load
    }
