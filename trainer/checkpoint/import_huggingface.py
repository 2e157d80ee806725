"""Read Hugging Face weights: safetensors only, through transformers, which knows how families name their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from trainer.checkpoint.import_source import ForeignTensor, Source
from trainer.core.errors import Problem, RefusedError
from trainer.core.hub import unreachable
from trainer.engine.state_replicated import persistent_buffers

_SHOWN = 20


def looks_like_weights(directory: Path) -> bool:
    """Return whether a directory holds Hugging Face weights. Raises RefusedError if they are pickled ones only."""
    if any(directory.glob("*.safetensors")):
        return True
    pickled = sorted(path.name for path in directory.glob("*.bin"))
    if pickled:
        rule = f"holds pickled weights only ({', '.join(pickled[:3])}): loading them can run code that they name"
        fix = "convert them to safetensors where you trust them: from_pretrained(...).save_pretrained(DIR)"
        raise RefusedError(Problem("SOURCE", str(directory), rule, fix), title="import refused")
    return False


def dtype_of(path: str) -> str:
    """Return float32 or bfloat16, as the config of a directory or id says. Raises RefusedError if there is none."""
    try:
        fields, _ = PretrainedConfig.get_config_dict(path, local_files_only=unreachable(path))
    except OSError as error:
        rule = f"has no config.json ({str(error).strip().splitlines()[0]})"
        raise RefusedError(
            Problem("SOURCE", path, rule, "name a directory or id with --model"), "import refused"
        ) from error
    said = str(fields.get("dtype") or fields.get("torch_dtype") or "")
    return "bfloat16" if said.removeprefix("torch.") == "bfloat16" else "float32"


def read_hugging_face(path: str, config: PretrainedConfig, dtype: str) -> Source:
    """Return the weights of a directory or id, in float32: the whole model is in memory.

    Raises RefusedError if transformers can't load them as the model of ``config``, whole and without leftovers.
    """
    try:
        # cast: with output_loading_info it returns a pair, which its annotation leaves out
        network, info = cast("Any", AutoModelForCausalLM).from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,  # pickled weights run code on load
            trust_remote_code=False,
            local_files_only=unreachable(path),
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = "give a directory or id with safetensors, and the config.json that belongs to them (--model)"
        raise RefusedError(Problem("SOURCE", path, f"can't be loaded ({reason})", fix), "import refused") from error
    problems = [
        Problem(name, None, rule, "give the config.json that belongs to the weights (--model)")
        for key, rule in (
            ("missing_keys", "is missing in the weights"),
            ("unexpected_keys", "is left over: the model has no such parameter"),
            ("mismatched_keys", "has another shape than in the model"),
        )
        for name in sorted(map(str, info.get(key, ())))[:_SHOWN]
    ]
    if problems:
        raise RefusedError(problems, title="import refused")
    return Source(
        path,
        f"Hugging Face weights {path}",
        {name: ForeignTensor.of(parameter.detach()) for name, parameter in network.named_parameters()},
        {name: ForeignTensor.of(buffer) for name, buffer in persistent_buffers(network)},
        dtype=dtype,
        directory=Path(path) if Path(path).is_dir() else None,
    )
