"""Loss and MLPs in tiles: the same numbers as without, and never more than a tile of the large tensors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from compatibility_configs import attention_of, tiny_config

from trainer.core.errors import RecipeError
from trainer.models.loss import LossSpec, cross_entropy_by_row
from trainer.models.tiling import TiledLoss, mlp_names, tile_mlp
from trainer.tasks.pretrain import loss_spec

pytestmark = pytest.mark.fast
SIZE, ROWS, LENGTH = 5, 2, 16
LOSS = LossSpec("next_token", cross_entropy_by_row)


def made(kind: str, **fields: Any) -> PreTrainedModel:
    config = {**tiny_config(kind), **fields}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation=attention_of(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(3, 100, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    targets[0, :7] = -100  # a tile without targets, and a part of one
    return tokens[:, :-1], targets


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def deviation(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert set(found) == set(expected)
    floor = 1e-5 * torch.stack([value.norm() for value in expected.values()]).norm()
    return max(((found[n] - e).norm() / torch.maximum(e.norm(), floor)).item() for n, e in expected.items())


@pytest.mark.parametrize(
    "family",
    ["llama", "gpt2", "opt", "bloom", "gemma2", "gemma3_text", "gemma4_text", "granite", "cohere", "mixtral", "rwkv"],
)
def test_tiled_loss_equals_the_whole_one(family: str) -> None:
    model = made(family)
    inputs, targets = batch()
    whole = cross_entropy_by_row(model(input_ids=inputs, use_cache=False).logits, targets)
    expected = gradients(model, whole.sum())
    losses, auxiliary = TiledLoss(model, LOSS, SIZE)(targets, input_ids=inputs, use_cache=False)
    assert auxiliary is None
    assert torch.allclose(losses, whole, rtol=1e-6)
    assert deviation(gradients(model, losses.sum()), expected) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "lfm2", "recurrent_gemma", "deepseek_v3"])
def test_tiled_mlps_equal_whole_ones(family: str) -> None:
    model = made(family)
    inputs, targets = batch()
    whole = cross_entropy_by_row(model(input_ids=inputs, use_cache=False).logits, targets).sum()
    expected = gradients(model, whole)
    names = mlp_names(model, SIZE)
    for name in names:
        tile_mlp(model.get_submodule(name), SIZE)
    tiled = cross_entropy_by_row(model(input_ids=inputs, use_cache=False).logits, targets).sum()
    assert torch.allclose(tiled, whole, rtol=1e-6)
    assert deviation(gradients(model, tiled), expected) < 1e-5
    # The first block of this mixture has an MLP, the others have experts.
    assert len(names) == (1 if family == "deepseek_v3" else 4)


def test_what_has_no_mlp_of_its_own_is_refused() -> None:
    for family in ("opt", "mixtral", "bloom"):
        with pytest.raises(RecipeError, match=f"memory.tiled_mlp = 5: {family} has no MLP"):
            mlp_names(made(family), SIZE)


def test_an_mlp_that_returns_more_is_refused() -> None:
    class Mixes(nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
            return hidden_states, None

    module = Mixes()
    tile_mlp(module, SIZE)
    with pytest.raises(RecipeError, match="Mixes does not return hidden states"):
        module(torch.ones(1, LENGTH, 8))


def test_the_load_balancing_loss_is_of_all_tokens() -> None:
    model = made("mixtral", output_router_logits=True)
    inputs, targets = batch()
    outputs = model(input_ids=inputs, use_cache=False)
    whole = cross_entropy_by_row(outputs.logits, targets).sum()
    expected = gradients(model, whole + outputs.aux_loss)
    losses, auxiliary = TiledLoss(model, LOSS, SIZE)(targets, input_ids=inputs, use_cache=False)
    assert auxiliary is not None
    assert torch.equal(auxiliary, outputs.aux_loss)
    assert deviation(gradients(model, losses.sum() + auxiliary), expected) < 1e-5


def test_what_pads_a_vocabulary_gets_no_probability() -> None:
    model, (inputs, targets) = made("llama"), batch()
    whole = cross_entropy_by_row(model(input_ids=inputs, use_cache=False).logits[..., :101], targets)
    losses, _ = TiledLoss(model, loss_spec(101), SIZE)(targets, input_ids=inputs, use_cache=False)
    assert torch.allclose(losses, whole, rtol=1e-6)


def test_rows_that_flash_attention_takes_as_one() -> None:
    model, (inputs, targets) = made("llama"), batch()
    positions = torch.arange(LENGTH).repeat(ROWS)[None]
    flat = {"input_ids": inputs.reshape(1, -1), "position_ids": positions, "use_cache": False}
    whole = cross_entropy_by_row(model(**flat).logits.view(ROWS, LENGTH, -1), targets)
    assert torch.allclose(TiledLoss(model, LOSS, SIZE)(targets, **flat)[0], whole, rtol=1e-6)


def test_dropout_is_the_same_when_it_is_recomputed() -> None:
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Dropout(0.5), nn.Linear(16, 8, bias=False))
    tile_mlp(model, SIZE)
    states = torch.randn(1, LENGTH, 8, requires_grad=True)
    output = model(states)
    output.sum().backward()
    # Linear in its input, so that x . dy/dx is y where the mask is the same on both ways.
    assert states.grad is not None
    assert torch.allclose((states * states.grad).sum(), output.sum(), rtol=1e-4)


def test_gradients_are_summed_over_tiles_in_float32() -> None:
    def found(dtype: torch.dtype, size: int | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).bfloat16().to(dtype)
        states = (torch.randn(1, 2048, 32) + 0.5).bfloat16().to(dtype).requires_grad_()
        if size is not None:
            tile_mlp(model, size)
        return {name: g.float() for name, g in gradients(model, model(states).float().sum()).items()}

    exact = found(torch.float32, None)
    assert deviation(found(torch.bfloat16, 8), exact) < 1.5 * deviation(found(torch.bfloat16, None), exact)


class _Largest(TorchDispatchMode):
    """Finds the largest tensor with a last dim of ``width``, in elements."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.found = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.dim() > 1 and leaf.shape[-1] == self.width:
                self.found = max(self.found, leaf.numel())
        return output


@pytest.mark.parametrize("tiled", [True, False])
def test_logits_and_insides_of_mlps_are_never_whole(tiled: bool) -> None:
    vocabulary, inside, length = 1009, 499, 64
    model = made("llama", vocab_size=vocabulary, intermediate_size=inside, hidden_size=16, num_attention_heads=2)
    inputs = torch.randint(3, 100, (1, length))
    if tiled:
        for name in mlp_names(model, SIZE):
            tile_mlp(model.get_submodule(name), SIZE)
    loss = TiledLoss(model, LOSS, SIZE)
    for width, weights in ((vocabulary, 16), (inside, 16)):
        with _Largest(width) as largest:
            if tiled:
                total = loss(inputs, input_ids=inputs, use_cache=False)[0].sum()
            else:
                total = cross_entropy_by_row(model(input_ids=inputs, use_cache=False).logits, inputs).sum()
            total.backward()
        # Matrices of that width, and their gradients, have ``weights`` rows.
        assert largest.found == width * (weights if tiled else length)
