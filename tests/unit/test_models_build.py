"""Initial weights: other schemes, and values that only constructors give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from trainer.config.model import ModelConfig
from trainer.models.build import build_model
from trainer.models.config import hugging_face_config, unpadded_vocabulary_size

pytestmark = pytest.mark.fast

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip


def built(**fields: Any) -> PreTrainedModel:
    model = ModelConfig.model_validate({"config": LLAMA, "dtype": "float32"} | fields)
    return build_model(model, hugging_face_config(model), seed=3, device=torch.device("cpu"))


def test_what_writes_to_the_residual_stream_is_scaled() -> None:
    plain, scaled = built(), dict(built(initialization="scaled_residual").named_parameters())
    for name, parameter in plain.named_parameters():
        ends_a_block = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert torch.allclose(scaled[name], parameter * (1 / 4 if ends_a_block else 1)), name
    assert sum(name.endswith("o_proj.weight") for name in scaled) == 8


def test_values_that_only_the_constructor_gives() -> None:
    config = {
        "model_type": "apertus", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0,
    }  # fmt: skip
    ours = dict(built(config=config).named_parameters())
    model = ModelConfig.model_validate({"config": config, "dtype": "float32"})
    theirs = AutoModelForCausalLM.from_config(hugging_face_config(model), dtype=torch.float32)
    alphas = [name for name in ours if "alpha" in name]
    assert alphas
    for name in alphas:
        assert torch.equal(ours[name], theirs.get_parameter(name))


def test_padded_vocabulary() -> None:
    model = ModelConfig.model_validate({"config": LLAMA, "vocabulary_multiple": 64})
    assert hugging_face_config(model).vocab_size == 128
    assert unpadded_vocabulary_size(model) == 100
    even = ModelConfig.model_validate({"config": LLAMA, "vocabulary_multiple": 50})
    assert unpadded_vocabulary_size(even) is None
