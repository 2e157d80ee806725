"""Turn the recipe's model section into a Hugging Face config."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from trainer.config.model import ModelConfig
from trainer.core.errors import Problem, RecipeError
from trainer.core.hub import unreachable


def hugging_face_config(model: ModelConfig) -> PretrainedConfig:
    """Return the config of the model to build, overrides applied.

    Raises RecipeError when the path can't be read or the fields are refused by transformers.
    """
    overrides = dict(model.config or {})
    try:
        if model.path is None:
            config = AutoConfig.for_model(overrides.pop("model_type"), **overrides)
        else:
            config = AutoConfig.from_pretrained(
                model.path,
                revision=model.revision,
                trust_remote_code=model.trust_remote_code,
                local_files_only=unreachable(model.path),
                **overrides,
            )
    except (OSError, ValueError, TypeError, KeyError) as error:
        key = "model.path" if model.path else "model.config"
        raise RecipeError(
            Problem(
                key, model.path, f"transformers can't make a config of it ({error})", "check the path or the fields"
            )
        ) from error
    if model.path is None and model.vocabulary_multiple:
        multiple = model.vocabulary_multiple
        config.vocab_size = -(-config.vocab_size // multiple) * multiple
    config.dtype = model.dtype
    # Training never reads the key/value cache; leaving it on costs memory and breaks recomputation.
    config.use_cache = False
    return config


def unpadded_vocabulary_size(model: ModelConfig) -> int | None:
    """Return the vocabulary size that was asked for where ``vocabulary_multiple`` has made it larger, else None."""
    if model.path is not None or not model.vocabulary_multiple:
        return None
    asked = hugging_face_config(model.model_copy(update={"vocabulary_multiple": None})).get_text_config().vocab_size
    return asked if asked % model.vocabulary_multiple else None


def config_to_dictionary(config: PretrainedConfig) -> dict[str, Any]:
    """Return the config as JSON-ready fields, as ``config.json`` of an exported model holds them."""
    fields = config.to_dict()
    fields["use_cache"] = True
    fields["dtype"] = str(config.dtype).removeprefix("torch.")
    return fields
