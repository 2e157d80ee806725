"""Pretrained models with tokens added: what they had stays, new rows are the mean of the old, padding is zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.config.model import ModelConfig
from trainer.core.errors import RecipeError
from trainer.models.build import build_model, skeleton
from trainer.models.config import hugging_face_config, own_vocabulary_size, unpadded_vocabulary_size
from trainer.models.stages import Stage, StagePart, anatomy_of
from trainer.models.vocabulary import with_rows
from trainer.tasks.pretrain import loss_spec

pytestmark = pytest.mark.fast

OWN, ASKED, PADDED = 100, 110, 128
SIZES: dict[str, Any] = {
    "vocab_size": OWN, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "padded llama": {"model_type": "llama", "pad_token_id": 3, **SIZES},
    "gpt2": {"model_type": "gpt2", "n_inner": 64, **SIZES},
    "gemma3_text": {"model_type": "gemma3_text", "head_dim": 8, **SIZES},
    "phi": {"model_type": "phi", **SIZES},
    "gemma3": {
        "model_type": "gemma3", "text_config": {"head_dim": 8, **SIZES}, "vision_config": VISION,
        "mm_tokens_per_image": 4, "image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92,
    },
}  # fmt: skip


def saved(family: str, path: Path) -> Path:
    torch.manual_seed(0)
    fields = dict(FAMILIES[family])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    with torch.no_grad():
        for parameter in model.parameters():  # biases too, which start at zero
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(path)
    return path


def section(path: Path, **fields: Any) -> ModelConfig:
    return ModelConfig.model_validate({"path": str(path), "dtype": "float32"} | fields)


def built(model: ModelConfig, part: StagePart | None = None) -> Any:
    return build_model(model, hugging_face_config(model), seed=3, device=torch.device("cpu"), part=part).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "fields", [{"vocabulary_size": ASKED, "vocabulary_multiple": 64}, {"vocabulary_multiple": 128}], ids=["both", "pad"]
)
def test_logits_of_old_tokens_stay_and_padding_gets_no_probability(
    family: str, fields: dict[str, int], tmp_path: Path
) -> None:
    model = section(saved(family, tmp_path), **fields)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours = built(model)
    real = fields.get("vocabulary_size", OWN)
    assert (own_vocabulary_size(model), unpadded_vocabulary_size(model)) == (OWN, real)
    assert ours.config.get_text_config().vocab_size == PADDED
    assert ours.get_input_embeddings().num_embeddings == ours.get_output_embeddings().out_features == PADDED
    assert ours.get_input_embeddings().padding_idx == theirs.get_input_embeddings().padding_idx
    tied = theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight
    assert (ours.get_input_embeddings().weight is ours.get_output_embeddings().weight) is tied
    tokens = torch.randint(OWN, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = ours(input_ids=tokens).logits, theirs(input_ids=tokens).logits
    # a matrix of another width is multiplied in other blocks: the last bit of a sum may differ
    assert (found[..., :OWN] - expected).abs().max() < 1e-6
    vocabulary = {name for name, parameter in ours.named_parameters() if parameter.shape[0] == PADDED}
    assert len(vocabulary) == (1 if tied else 2) + (family == "phi")
    for name, parameter in ours.named_parameters():
        own = theirs.get_parameter(name)
        assert torch.equal(parameter[: len(own)], own), name
        if name in vocabulary:
            assert torch.allclose(parameter[OWN:real], own.mean(0).expand_as(parameter[OWN:real]), atol=1e-7), name
            assert not parameter[real:].any(), name
    loss = loss_spec(real).function(found, tokens)
    reference = torch.nn.functional.cross_entropy(found[..., :real].flatten(0, 1), tokens.flatten(), reduction="sum")
    assert abs(loss.sum() - reference) < 1e-3
    assert abs(loss.sum() - loss_spec().function(found, tokens).sum()) > 1  # the padding would have had some


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stages_have_the_weights_of_the_whole_model(family: str, dtype: str, tmp_path: Path) -> None:
    model = section(saved(family, tmp_path), vocabulary_size=ASKED, vocabulary_multiple=64, dtype=dtype)
    network = built(model)
    whole = dict(network.named_parameters(remove_duplicate=False))
    anatomy = anatomy_of(skeleton(model, hugging_face_config(model)))
    inputs = {"input_ids": torch.arange(8).reshape(1, 8)}
    states = None
    for bounds in ((0, 1), (1, 2)):
        part = StagePart(anatomy, *bounds)
        stage = built(model, part)
        held = dict(stage.named_parameters(remove_duplicate=False))
        with_vocabulary = sum(parameter.shape[0] == PADDED for parameter in held.values())
        assert with_vocabulary == (2 if family == "phi" and part.is_last else 1)
        for name, parameter in held.items():
            assert not parameter.is_meta
            assert parameter.dtype == getattr(torch, dtype)
            assert torch.equal(parameter, whole[name]), name
        with torch.no_grad():
            states = Stage(stage, part)(inputs, states)
    with torch.no_grad():
        assert torch.equal(states, network(**inputs).logits)


def test_a_padding_token_may_be_among_the_new_ones(tmp_path: Path) -> None:
    model = section(saved("llama", tmp_path), vocabulary_size=OWN + 1, config={"pad_token_id": OWN})
    embedding = built(model).get_input_embeddings()
    assert (embedding.padding_idx, embedding.num_embeddings) == (OWN, OWN + 1)


def test_tokens_are_not_taken_away(tmp_path: Path) -> None:
    path = saved("gpt2", tmp_path)
    with pytest.raises(RecipeError, match=r"model\.vocabulary_size = 99: is less than the 100 tokens.*100 or more"):
        hugging_face_config(section(path, vocabulary_size=OWN - 1))
    assert hugging_face_config(section(path, vocabulary_size=OWN)).vocab_size == OWN


def test_only_rows_are_added() -> None:
    with pytest.raises(ValueError, match="can't be added"):
        with_rows(torch.ones(4, 2), (6, 3), 1)
    with pytest.raises(ValueError, match="can't be added"):
        with_rows(torch.ones(4, 2), (3, 2), 0)
    assert with_rows(torch.tensor([1.0, 3.0]), (4,), 1).tolist() == [1, 3, 2, 0]
