"""Muon against torch's own, and what it takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.config.optimizer import OptimizerConfig
from trainer.engine.muon import Muon, orthogonal
from trainer.engine.optimizers import MasterState, build_optimizer, initialise_state
from trainer.engine.state_replicated import ReplicatedState
from trainer.optim.groups import hidden_matrix

pytestmark = pytest.mark.fast


def test_steps_are_torchs() -> None:
    """torch computes in bfloat16, so the steps are alike to three digits."""
    config = OptimizerConfig(name="muon", learning_rate=0.1, weight_decay=0.3, momentum=0.9)
    torch.manual_seed(0)
    shapes = {"h.0.wide.weight": (6, 10), "h.0.tall.weight": (9, 4), "wte.weight": (5, 3), "h.0.norm.weight": (4,)}
    start = {name: torch.randn(shape) for name, shape in shapes.items()}
    ours = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    theirs = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = build_optimizer(config, ours.items(), torch.device("cpu"))
    assert isinstance(optimizer, Muon)
    state = ReplicatedState(list(ours.items()), MasterState(config, optimizer), 0, 1)
    initialise_state(config, optimizer, state.masters())
    optimizer.attach(state, None)
    matrices = [theirs["h.0.wide.weight"], theirs["h.0.tall.weight"]]
    muon = torch.optim.Muon(matrices, lr=0.1, weight_decay=0.3, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    table = {"params": [theirs["wte.weight"]], "weight_decay": 0.3}
    norm = {"params": [theirs["h.0.norm.weight"]], "weight_decay": 0.0}
    adamw = torch.optim.AdamW([table, norm], lr=0.1, betas=config.betas, eps=config.epsilon)
    for _ in range(4):
        for name, parameter in ours.items():
            parameter.grad = torch.randn(shapes[name])
            theirs[name].grad = parameter.grad.clone()
        optimizer.step()
        muon.step()
        adamw.step()
    for name, parameter in ours.items():
        moved = (theirs[name] - start[name]).abs().max()
        bound = 0.02 if name in ("h.0.wide.weight", "h.0.tall.weight") else 1e-6
        assert (parameter - theirs[name]).abs().max() < bound * moved


def test_singular_values_end_near_one() -> None:
    torch.manual_seed(1)
    stacked = torch.randn(3, 8, 20) * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1)
    values = torch.linalg.svdvals(orthogonal(stacked))
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize(
    ("name", "ndim"),
    [
        ("model.layers.0.self_attn.q_proj.weight", 2),
        ("transformer.h.11.mlp.c_fc.weight", 2),
        ("model.layers.3.mlp.experts.gate_up_proj", 3),
        ("model.layers.3.mlp.experts.7.w1.weight", 2),
        ("model.layers.3.mlp.gate.weight", 2),
    ],
)
def test_muon_takes(name: str, ndim: int) -> None:
    assert hidden_matrix(name, ndim)


@pytest.mark.parametrize(
    ("name", "ndim"),
    [
        ("model.embed_tokens.weight", 2),
        ("lm_head.weight", 2),
        ("transformer.wpe.weight", 2),
        ("model.layers.0.input_layernorm.weight", 1),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", 2),
        ("model.layers.0.per_layer_embedding.weight", 2),
        ("backbone.layers.0.mixer.conv1d.weight", 3),
        ("backbone.layers.0.mixer.A_log", 2),
    ],
)
def test_muon_leaves_to_adamw(name: str, ndim: int) -> None:
    assert not hidden_matrix(name, ndim)
