"""A clone of a model that runs in a moment on a CPU: same family, same features, small sizes."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from trainer.config.parallel import ParallelConfig
from trainer.core.errors import Problem, RecipeError

LARGEST = 50_000_000
"""Parameters beyond the embeddings that a clone may have."""
HEADS, HEAD_SIZE = 4, 8
# One value a field, whatever the family calls it; those a family has no use for are left out.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("attention_hidden_size", "lru_width", "expert_dim", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "ffn_embed_dim"), 64),
    **dict.fromkeys(("decoder_ffn_dim",), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("moe_layer_start_index",), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim"), HEAD_SIZE),
    **dict.fromkeys(("sliding_window", "attention_window_size", "state_size", "chunk_size"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state"), 8),
    **dict.fromkeys(("mamba_n_heads", "time_step_rank", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "num_shared_experts", "num_expert_group"), 1),
    **dict.fromkeys(("linear_head_dim", "index_head_dim", "hidden_size_per_layer_input", "laurel_rank"), 8),
    **dict.fromkeys(("linear_num_heads", "index_n_heads"), 4),
    "shared_experts_intermediate_size": 32,
    "index_topk": 8,
    "qk_head_dim": 16,
    "mamba_d_head": 16,
    "linear_num_key_heads": 2,
    "global_attn_every_n_layers": 2,
    "per_layer_config": {},
}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
LISTS = ("layer_types", "mlp_layer_types", "moe_layers", "block_types", "layers_block_type")


def small_fields(config: PretrainedConfig, num_layers: int) -> dict[str, Any]:
    """Return the fields that make a clone of ``config`` small, dropout and noise off."""
    given = config.to_dict()
    fields: dict[str, Any] = {name: value for name, value in SMALL.items() if name in given}
    fields |= {name: num_layers for name in LAYERS if name in given}
    fields |= {name: values for name in LISTS if (values := pattern(given.get(name), num_layers))}
    if given.get("sliding_window", 0) is None:
        del fields["sliding_window"]
    if "kv_lora_rank" in given:  # latent attention: as many keys as queries
        fields["num_key_value_heads"] = HEADS
    noise = {name for name, value in given.items() if isinstance(value, float) and ("drop" in name or "jitter" in name)}
    return fields | dict.fromkeys(noise, 0.0)


def pattern(values: Any, num_layers: int) -> list[Any]:
    """Return kinds of layers for so many layers, each kind that there is among them if there is room."""
    if not isinstance(values, list) or not values:
        return []
    kinds = list(dict.fromkeys(values))
    return (kinds * num_layers)[:num_layers]


def shrunk_config(config: PretrainedConfig, parallel: ParallelConfig, sequence_length: int, attention: str) -> Any:
    """Return a small config of the same family that runs: small everywhere, else only in its number of layers.

    Heads stay divisible by the tensor and sequence degree, and every stage has two blocks. Raises RecipeError if
    neither makes a model.
    """
    text = config.get_text_config()
    num_layers = max(2 * parallel.pipeline, 2, len(set(getattr(text, "layer_types", None) or ())))
    unit = math.lcm(parallel.tensor, parallel.sequence)
    few_layers = {name: num_layers for name in LAYERS if name in text.to_dict()}
    few_layers |= {name: v for name in LISTS if (v := pattern(text.to_dict().get(name), num_layers))}
    attempts = [small_fields(text, num_layers) | _heads(text, unit), few_layers]
    reasons: list[str] = []
    for fields in attempts:
        try:
            return _tried(config, fields, sequence_length, attention)
        except Exception as error:  # noqa: BLE001 - whatever a family's code says to sizes it does not like
            reasons.append(f"{type(error).__name__}: {error}")
    rule = f"no small clone of {config.model_type} can be made ({' | '.join(reasons)[:300]})"
    raise RecipeError(Problem("model", None, rule, "verify it with a smaller config of the family"))


def _heads(config: PretrainedConfig, unit: int) -> dict[str, Any]:
    """Return heads that ``unit`` divides, grouped if the model's are."""
    given = config.to_dict()
    heads = HEADS * unit // math.gcd(HEADS, unit)
    fields: dict[str, Any] = {n: heads for n in ("num_attention_heads", "n_head", "n_heads", "num_heads") if n in given}
    fields |= {name: heads * HEAD_SIZE for name in ("hidden_size", "n_embd", "d_model") if name in given}
    groups = given.get("num_key_value_heads")
    if "num_key_value_heads" in given and "kv_lora_rank" not in given:
        grouped = groups is not None and groups < (given.get("num_attention_heads") or 0)
        fields["num_key_value_heads"] = 1 if groups == 1 else heads // 2 if grouped else heads
    return fields


def _tried(config: PretrainedConfig, fields: dict[str, Any], sequence_length: int, attention: str) -> PretrainedConfig:
    given = config.to_dict()
    inner = next(
        (n for n in getattr(config, "sub_configs", {}) if getattr(config, n) is config.get_text_config()), None
    )
    if inner is not None:
        given[inner] = given[inner] | fields
    else:
        given |= fields
    if "max_position_embeddings" in given:
        given["max_position_embeddings"] = max(64, sequence_length)
    small = AutoConfig.for_model(given.pop("model_type"), **given)
    with no_init_weights(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small, attn_implementation=attention)
    size = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} M parameters")
    real = AutoModelForCausalLM.from_config(small, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        real(input_ids=torch.arange(3, 11)[None], use_cache=False)
    return small
