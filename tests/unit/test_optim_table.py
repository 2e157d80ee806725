"""The optimizer table against torch itself, and which parameters of real models are decayed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.config.optimizer import OptimizerConfig
from trainer.optim.groups import decayed
from trainer.optim.table import TABLE

pytestmark = pytest.mark.fast

CONFIGS = [
    {"name": "adamw", "betas": (0.8, 0.9), "epsilon": 1e-6},
    {"name": "sgd"},
    {"name": "sgd", "momentum": 0.9, "weight_decay": 0.0},
]


def test_every_name_of_the_recipe_is_in_the_table() -> None:
    assert set(TABLE) == set(OptimizerConfig.model_fields["name"].annotation.__args__)  # type: ignore[union-attr]
    assert all(spec.name == name for name, spec in TABLE.items())


@pytest.mark.parametrize("settings", CONFIGS)
def test_state_and_hyperparameters_are_torchs(settings: dict[str, Any]) -> None:
    config = OptimizerConfig.model_validate(settings)
    spec = TABLE[config.name]
    parameter = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = getattr(torch.optim, spec.torch_class)([parameter], **spec.hyperparameters(config))
    parameter.grad = torch.ones(3, 4)
    optimizer.step()
    state = {key: value for key, value in optimizer.state[parameter].items() if value is not None}
    assert ("step" in state) == spec.counts_steps
    tensors = {key for key, value in state.items() if key != "step" and value.shape == parameter.shape}
    assert set(spec.torch_state_keys(config).values()) == tensors == set(state) - {"step"}
    assert tuple(spec.torch_state_keys(config)) == spec.state_keys(config)
    group = optimizer.param_groups[0]
    assert group["lr"] == config.learning_rate
    assert group["weight_decay"] == config.weight_decay
    if config.name == "adamw":
        assert (group["betas"], group["eps"]) == (config.betas, config.epsilon)
    else:
        assert group["momentum"] == config.momentum


def test_logical_names() -> None:
    assert TABLE["adamw"].state_keys(OptimizerConfig()) == ("exp_avg", "exp_avg_sq")
    momentum = OptimizerConfig(name="sgd", momentum=0.9)
    assert TABLE["sgd"].torch_state_keys(momentum) == {"momentum": "momentum_buffer"}
    assert TABLE["sgd"].state_keys(OptimizerConfig(name="sgd")) == ()


@pytest.mark.parametrize(
    ("name", "ndim"),
    [
        ("model.embed_tokens.weight", 2),
        ("model.layers.0.self_attn.q_proj.weight", 2),
        ("lm_head.weight", 2),
        ("transformer.h.0.mlp.c_fc.weight", 2),
        ("model.layers.0.mlp.experts.gate_up_proj", 3),
        ("backbone.layers.0.mixer.conv1d.weight", 3),
        ("model.normal_proj.weight", 2),
        ("model.layers.0.norm1.linear.weight", 2),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", 2),
    ],
)
def test_matrices_are_decayed(name: str, ndim: int) -> None:
    assert decayed(name, ndim)


@pytest.mark.parametrize(
    ("name", "ndim"),
    [
        ("model.layers.0.input_layernorm.weight", 1),
        ("model.layers.0.self_attn.q_proj.bias", 1),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", 2),
        ("model.layers.0.self_attn.sinks", 1),
        ("model.layers.0.self_attn.q_norm.weight", 2),
        ("model.layers.0.self_attn.q_layernorm.weight", 2),
        ("transformer.h.0.ln_1.weight", 2),
        ("transformer.ln_f.weight", 2),
        ("model.layers.0.post_attention_layer_norm.weight", 2),
        ("backbone.layers.0.mixer.A_log", 2),
        ("scale", 0),
    ],
)
def test_vectors_norms_and_biases_are_not(name: str, ndim: int) -> None:
    assert not decayed(name, ndim)
