"""The load-balancing loss of a model in stages is the one of the whole model, and so is its gradient."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.output_capturing import _active_collector

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from compatibility_configs import attention_of, tiny_config

from trainer.core.errors import RecipeError
from trainer.models.router_logits import RouterLogits, router_logits_of
from trainer.models.stages import Stage, StagePart, anatomy_of

pytestmark = pytest.mark.fast
ROWS, LENGTH, EXPERTS = 2, 16, 4


def made(kind: str, **fields: Any) -> PreTrainedModel:
    config = {**tiny_config(kind), "output_router_logits": True, **fields}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation=attention_of(config))
    return model.train()


@contextlib.contextmanager
def collected(logits: list[torch.Tensor]) -> Iterator[None]:
    """A pass in which transformers has recorded router logits."""
    token = _active_collector.set({"router_logits": logits})
    try:
        yield
    finally:
        _active_collector.reset(token)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("mixtral", {}),
        ("qwen3_moe", {"mlp_only_layers": [0]}),  # the first stage has no router
        ("qwen3_moe", {"mlp_only_layers": [1, 3]}),  # the others have none
        ("ernie4_5_moe", {}),
    ],
)
def test_stages_compute_it_of_all_blocks(
    family: str, fields: dict[str, Any], recomputed: bool, dtype: torch.dtype
) -> None:
    whole = made(family, **fields).to(dtype)
    anatomy = anatomy_of(whole)
    networks = [copy.deepcopy(whole) for _ in range(3)]
    if recomputed:
        for network in networks:
            network.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = {"input_ids": torch.randint(3, 100, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))}
    stages = [
        Stage(network, StagePart(anatomy, *bounds))
        for network, bounds in zip(networks, pairwise((0, 1, 3, anatomy.num_blocks)), strict=True)
    ]
    sent = None
    for stage in stages:
        sent = stage(inputs, sent)
    expected, found = whole(**inputs, use_cache=False), stages[-1].auxiliary
    assert found is not None
    assert sent is not None
    assert torch.equal(sent, expected.logits)
    assert torch.equal(found, expected.aux_loss)
    assert all(stage.auxiliary is None for stage in stages[:-1])
    expected.aux_loss.backward()
    found.backward()
    gradients = {name: p.grad for network in networks for name, p in network.named_parameters() if p.grad is not None}
    known = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    assert known.keys() <= gradients.keys()
    for name, gradient in gradients.items():  # what no router sees gets zero where hidden states were sent on
        reference = known.get(name, torch.zeros_like(gradient)).float()
        bound = 1e-5 if dtype == torch.float32 else 2e-2  # in bfloat16 the order of a sum shows
        assert (gradient.float() - reference).norm() <= bound * reference.norm(), name


def test_logits_in_float32_keep_their_precision() -> None:
    routers = RouterLogits("some", 8, EXPERTS, torch.bfloat16)
    states = torch.randn(ROWS, LENGTH, 8, dtype=torch.bfloat16)
    logits = torch.randn(ROWS * LENGTH, EXPERTS)
    with collected([logits, logits + 1]):
        sent = routers.join(states)
    assert torch.equal(routers.split(sent), states)
    assert len(routers.arrived) == 2
    assert torch.equal(routers.arrived[1], logits + 1)


@pytest.mark.parametrize("shape", [(ROWS, LENGTH, EXPERTS), (ROWS * LENGTH, EXPERTS + 1)])
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    routers = RouterLogits("some", 8, EXPERTS, torch.float32)
    with (
        collected([torch.zeros(shape)]),
        pytest.raises(RecipeError, match="some has hidden states or router logits"),
    ):
        routers.join(torch.zeros(ROWS, LENGTH, 8))


def test_a_family_that_records_none_is_refused() -> None:
    with pytest.raises(RecipeError, match="llama does not record the logits of its routers"):
        router_logits_of(made("llama"))


def test_nothing_travels_unless_the_config_asks() -> None:
    assert router_logits_of(made("mixtral", output_router_logits=False)) is None
