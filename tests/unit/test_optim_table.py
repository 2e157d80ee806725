"""The optimizer table against torch itself, and which parameters of real models are decayed."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from trainer.config.optimizer import OptimizerConfig
from trainer.engine.lion import Lion
from trainer.optim.groups import GroupSettings, decayed, group_settings
from trainer.optim.table import TABLE

pytestmark = pytest.mark.fast

CONFIGS = [
    {"name": "adamw", "betas": (0.8, 0.9), "epsilon": 1e-6},
    {"name": "sgd"},
    {"name": "sgd", "momentum": 0.9, "weight_decay": 0.0},
    {"name": "lion", "betas": (0.9, 0.99)},
    {"name": "adagrad", "epsilon": 1e-7},
]


def test_every_name_of_the_recipe_is_in_the_table() -> None:
    assert set(TABLE) == set(OptimizerConfig.model_fields["name"].annotation.__args__)  # type: ignore[union-attr]
    assert all(spec.name == name for name, spec in TABLE.items())


@pytest.mark.parametrize("settings", CONFIGS)
def test_state_and_hyperparameters_are_torchs(settings: dict[str, Any]) -> None:
    config = OptimizerConfig.model_validate(settings)
    spec = TABLE[config.name]
    parameter = torch.nn.Parameter(torch.ones(3, 4))
    module, name = spec.implementation.rsplit(".", 1)
    optimizer = getattr(importlib.import_module(module), name)([parameter], **spec.hyperparameters(config))
    parameter.grad = torch.ones(3, 4)
    optimizer.step()
    state = {key: value for key, value in optimizer.state[parameter].items() if value is not None}
    assert ("step" in state) == spec.counts_steps
    tensors = {key for key, value in state.items() if key != "step" and value.shape == parameter.shape}
    assert set(spec.torch_state_keys(config).values()) == tensors == set(state) - {"step"}
    group = optimizer.param_groups[0]
    assert group["lr"] == config.learning_rate
    assert group["weight_decay"] == config.weight_decay
    named = {"betas": config.betas, "eps": config.epsilon, "momentum": config.chosen_momentum}
    wanted = {"adamw": ("betas", "eps"), "sgd": ("momentum",), "lion": ("betas",), "adagrad": ("eps",)}[config.name]
    assert {key: group[key] for key in wanted} == {key: named[key] for key in wanted}


def test_logical_names() -> None:
    assert tuple(TABLE["adamw"].torch_state_keys(OptimizerConfig())) == ("exp_avg", "exp_avg_sq")
    muon = OptimizerConfig(name="muon")
    assert TABLE["muon"].torch_state_keys(muon, orthogonal=True) == {"momentum": "momentum_buffer"}
    momentum = OptimizerConfig(name="sgd", momentum=0.9)
    assert TABLE["sgd"].torch_state_keys(momentum) == {"momentum": "momentum_buffer"}
    assert TABLE["sgd"].torch_state_keys(OptimizerConfig(name="sgd")) == {}


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


def test_lion_is_the_papers() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 3), torch.randn(4, 5, 3)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = Lion([parameter], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    weight, momentum = start.double(), torch.zeros(5, 3, dtype=torch.float64)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        # algorithm 2, line by line
        update = (0.9 * momentum + 0.1 * gradient.double()).sign()
        momentum = 0.99 * momentum + 0.01 * gradient.double()
        weight = weight - 0.1 * (update + 0.5 * weight)
    assert torch.allclose(parameter.double(), weight, atol=1e-5)
    assert torch.allclose(optimizer.state[parameter]["exp_avg"].double(), momentum, atol=1e-6)


def test_groups_by_name() -> None:
    config = OptimizerConfig.model_validate(
        {
            "weight_decay": 0.1,
            "groups": [
                {"pattern": r"embed", "learning_rate_ratio": 0.5},
                {"pattern": r"^lm_head", "weight_decay": 0.02},
                {"pattern": r".", "learning_rate_ratio": 2.0},
            ],
        }
    )
    assert group_settings("model.embed_tokens.weight", 2, config) == GroupSettings(0.1, 0.5)
    assert group_settings("lm_head.weight", 2, config) == GroupSettings(0.02, 1.0)
    assert group_settings("lm_head.bias", 1, config) == GroupSettings(0.02, 1.0)
    assert group_settings("model.norm.weight", 1, config) == GroupSettings(0.0, 2.0)
    assert group_settings("model.norm.weight", 1, OptimizerConfig(weight_decay=0.1)) == GroupSettings(0.0, 1.0)
