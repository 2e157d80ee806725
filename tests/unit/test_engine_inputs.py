"""Documents packed into one row give what each gives alone, in unmodified models of many families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.data.batches import MicroBatch
from trainer.engine.inputs import model_inputs

LENGTHS = (5, 1, 9, 17)
COMMON = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 8},
    "phi3": {},
    "olmo2": {},
    "gpt_neox": {"num_key_value_heads": None},
    "gpt2": {"n_positions": 64, "n_embd": 32, "n_head": 4, "n_layer": 2},
    "mixtral": {"num_local_experts": 2},
}


def tiny(family: str, attention: str) -> torch.nn.Module:
    fields = {name: value for name, value in {**COMMON, **FAMILIES.get(family, {})}.items() if value is not None}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **fields)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def packed() -> tuple[MicroBatch, list[torch.Tensor]]:
    """Two rows of the same documents in another order, and the documents."""
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(1, 64, (length,), generator=generator) for length in LENGTHS]
    rows = [documents, documents[::-1]]
    ids = torch.stack([torch.cat(row) for row in rows])
    positions = torch.stack([torch.cat([torch.arange(len(document)) for document in row]) for row in rows])
    numbers = torch.stack([torch.cat([torch.full_like(d, i) for i, d in enumerate(row)]) for row in rows])
    return MicroBatch(ids, ids, positions, numbers), documents


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_document_is_alone(family: str, attention: str) -> None:
    network = tiny(family, attention)
    batch, documents = packed()
    logits = network(**model_inputs(batch, network, torch.device("cpu")), use_cache=False).logits
    for row, order in zip(logits, (documents, documents[::-1]), strict=True):
        for found, document in zip(row.split([len(d) for d in order]), order, strict=True):
            alone = network(input_ids=document[None], use_cache=False).logits[0]
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
    # Without positions the documents see each other: the comparison above can fail.
    mixed = network(input_ids=batch.input_ids, use_cache=False).logits
    assert not torch.allclose(mixed[0, 5:], logits[0, 5:], rtol=1e-2, atol=1e-3)


@torch.no_grad()
def test_flash_attention_is_given_one_row_and_cumulative_lengths() -> None:
    """FlashAttention needs a GPU: here its arguments are looked at, and the flattened row goes through SDPA."""
    network = tiny("llama", "sdpa")
    batch, _ = packed()
    plain = network(**model_inputs(batch, network, torch.device("cpu")), use_cache=False).logits
    network.config._attn_implementation = "flash_attention_2"
    inputs = model_inputs(batch, network, torch.device("cpu"))
    assert inputs["cu_seq_lens_q"].tolist() == [0, 5, 6, 15, 32, 49, 58, 59, 64]
    assert inputs["cu_seq_lens_q"].dtype == torch.int32
    assert (inputs["max_length_q"], inputs["input_ids"].shape) == (17, (1, 64))
    network.config._attn_implementation = "sdpa"
    flat = network(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False).logits
    torch.testing.assert_close(flat.view(plain.shape), plain, rtol=1e-4, atol=1e-5)


def test_a_batch_without_positions_is_passed_as_it_is() -> None:
    network = tiny("llama", "sdpa")
    ids = torch.ones(1, 4, dtype=torch.int64)
    assert list(model_inputs(MicroBatch(ids, ids), network, torch.device("cpu"))) == ["input_ids"]
