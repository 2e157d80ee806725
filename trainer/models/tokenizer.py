"""Load the tokenizer a run is exported with."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from trainer.core.errors import Problem, RefusedError
from trainer.core.hub import unreachable


def load_tokenizer(path: str, revision: str | None = None, key: str = "tokenizer.path") -> Any:
    """Return the tokenizer of a directory or Hugging Face id; no code of its own is run.

    Raises RefusedError, naming ``key``, if transformers can't load it.
    """
    try:
        return AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=False, local_files_only=unreachable(path)
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fix = "give a directory that AutoTokenizer loads, e.g. what `trainer data tokenizer` wrote"
        raise RefusedError(Problem(key, path, f"can't be loaded as a tokenizer ({reason})", fix)) from error
