"""Tiny configs of every causal-LM family of transformers, made from the fields its config class has."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NUM_LAYERS = 4
VOCABULARY = 128
LARGEST = 5_000_000
# One value a field, whatever the family calls it; those a family has no use for are left out.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("attention_hidden_size", "lru_width", "expert_dim", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "ffn_embed_dim"), 64),
    **dict.fromkeys(("decoder_ffn_dim",), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), NUM_LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("moe_layer_start_index",), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("sliding_window", "attention_window_size", "state_size", "chunk_size"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state"), 8),
    **dict.fromkeys(("mamba_n_heads", "time_step_rank", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "num_shared_experts", "num_expert_group"), 1),
    **dict.fromkeys(("linear_head_dim", "index_head_dim", "hidden_size_per_layer_input", "laurel_rank"), 8),
    **dict.fromkeys(("linear_num_heads", "index_n_heads"), 4),
    **dict.fromkeys(("num_experts_per_token",), 2),
    "shared_experts_intermediate_size": 32,
    "model_max_length": 64,
    "vocab_size_per_layer_input": VOCABULARY,
    "per_layer_config": {},
    "index_topk": 8,
    "qk_head_dim": 16,
    "mamba_d_head": 16,
    "linear_num_key_heads": 2,
    "global_attn_every_n_layers": 2,
    "vocab_size": VOCABULARY,
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
LISTS = ("layer_types", "mlp_layer_types", "moe_layers", "block_types", "layers_block_type")


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
    fields = {"model_type": kind, **_tiny_fields(default), **SPECIAL.get(kind, {})}
    return {name: value for name, value in fields.items() if value is not _ABSENT}


_ABSENT = object()


def _tiny_fields(default: PretrainedConfig) -> dict[str, Any]:
    given = default.to_dict()
    text = default.get_text_config()
    if text is not default:  # a text model inside of a multimodal config
        inner = next(name for name in default.sub_configs if getattr(default, name) is text)
        return {inner: _tiny_fields(text)}
    fields = {name: value for name, value in SMALL.items() if name in given}
    for name in LISTS:
        values = given.get(name)
        if isinstance(values, list) and values:
            kinds = list(dict.fromkeys(values))
            fields[name] = (kinds * NUM_LAYERS)[:NUM_LAYERS]
    if given.get("sliding_window", 0) is None:
        del fields["sliding_window"]
    if "kv_lora_rank" in given:  # latent attention: as many keys as queries
        fields["num_key_value_heads"] = 4
    fields |= {
        name: 0.0 for name, value in given.items() if ("drop" in name or "jitter" in name) and isinstance(value, float)
    }
    return fields
