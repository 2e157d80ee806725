"""Tiny configs of every causal-LM family of transformers, made from the fields its config class has."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trainer.verification.shrink import small_fields

NUM_LAYERS = 4
VOCABULARY = 128
LARGEST = 5_000_000
# Sizes that a clone of a real model keeps, but a model from nothing need not have.
SMALLER: dict[str, Any] = {
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length"), 64),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    "encoder_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What a family needs beside, or instead: sizes that its own code ties together.
SPECIAL: dict[str, dict[str, Any]] = {
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * NUM_LAYERS},
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "dots3_note_text": {"head_dim": 16},
    "phi4_multimodal": {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
            "crop_size": 28,
        },
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_blocks": 1,
            "num_attention_heads": 4,
            "ext_pw_out_channel": 32,
            "nemo_conv_channels": 32,
            "depthwise_separable_out_channel": 32,
        },
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "zaya": {"num_experts_per_tok": 1},
    "gpt2": {"n_inner": None},
}


def families() -> list[str]:
    """Return the model types with a causal LM."""
    return [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind in CONFIG_MAPPING]


def has_plan(kind: str) -> bool:
    """Return whether transformers publishes where the family may be cut."""
    return bool(getattr(CONFIG_MAPPING[kind], "base_model_pp_plan", None))


def attention_of(config: dict[str, Any]) -> str:
    """Return sdpa where the family has it, else eager. Raises ValueError for a model that is not tiny."""
    try:
        model, attention = _skeleton(config, "sdpa"), "sdpa"
    except ValueError:
        model, attention = _skeleton(config, "eager"), "eager"
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} M parameters")
    return attention


def _skeleton(config: dict[str, Any], attention: str) -> PreTrainedModel:
    with no_init_weights(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation=attention)


def tiny_config(kind: str) -> dict[str, Any]:
    """Return fields of a config of a few thousand parameters, without dropout, ``model_type`` among them."""
    default = CONFIG_MAPPING[kind]()
    return {"model_type": kind, **_tiny_fields(default), **SPECIAL.get(kind, {})}


def _tiny_fields(default: PretrainedConfig) -> dict[str, Any]:
    given = default.to_dict()
    text = default.get_text_config()
    if text is not default:  # a text model inside of a multimodal config
        inner = next(name for name in default.sub_configs if getattr(default, name) is text)
        return {inner: _tiny_fields(text)}
    return small_fields(text, NUM_LAYERS) | {name: value for name, value in SMALLER.items() if name in given}
