"""Turn the recipe's model section into a Hugging Face config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from trainer.config.model import ModelConfig
from trainer.core.errors import Problem, RecipeError
from trainer.core.hub import unreachable


def hugging_face_config(model: ModelConfig) -> PretrainedConfig:
    """Return the config of the model to build: overrides applied, vocabulary resized and padded.

    Raises RecipeError when the path can't be read, the fields are refused by transformers, or tokens would be lost.
    """
    config = _own_config(model)
    text, asked = config.get_text_config(), model.vocabulary_size
    if asked is not None:
        if asked < text.vocab_size:
            rule = f"is less than the {text.vocab_size} tokens that the model has, and none can be taken away"
            fix = f"set it to {text.vocab_size} or more, or remove it"
            raise RecipeError(Problem("model.vocabulary_size", asked, rule, fix))
        text.vocab_size = asked
    if model.vocabulary_multiple:
        text.vocab_size = -(-text.vocab_size // model.vocabulary_multiple) * model.vocabulary_multiple
    return config


def _own_config(model: ModelConfig) -> PretrainedConfig:
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
    config.dtype = model.dtype
    # Training never reads the key/value cache; leaving it on costs memory and breaks recomputation.
    config.use_cache = False
    return config


def unpadded_vocabulary_size(model: ModelConfig) -> int | None:
    """Return the vocabulary size that was asked for where ``vocabulary_multiple`` has made it larger, else None."""
    if not model.vocabulary_multiple:
        return None
    asked = hugging_face_config(model.model_copy(update={"vocabulary_multiple": None})).get_text_config().vocab_size
    return asked if asked % model.vocabulary_multiple else None


def own_vocabulary_size(model: ModelConfig) -> int:
    """Return how many tokens the model has before ``vocabulary_size`` and ``vocabulary_multiple`` add any."""
    return _own_config(model).get_text_config().vocab_size


def with_vocabulary_size(fields: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return the fields of a config with another vocabulary size, wherever the family keeps it."""
    config = AutoConfig.for_model(**fields)
    config.get_text_config().vocab_size = size
    return config.to_dict()


def config_to_dictionary(config: PretrainedConfig) -> dict[str, Any]:
    """Return the config as JSON-ready fields, as ``config.json`` of an exported model holds them."""
    fields = config.to_dict()
    fields["use_cache"] = True
    fields["dtype"] = str(config.dtype).removeprefix("torch.")
    return fields
