"""FLOPs per token against published numbers and against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.models.flops import decoder_block_parameters, training_flops_per_token

pytestmark = pytest.mark.fast


def test_gpt3_is_near_six_times_its_parameters() -> None:
    # GPT-3 175B (Brown et al. 2020, table 2.1): 96 layers, width 12288, 96 heads of 128, 2048 tokens.
    block = decoder_block_parameters(
        hidden_size=12288,
        intermediate_size=4 * 12288,
        num_attention_heads=96,
        num_key_value_heads=96,
        head_dim=128,
        gated_mlp=False,
    )
    assert block == 12 * 12288**2
    flops = training_flops_per_token(
        num_non_embedding_parameters=96 * block,
        vocabulary_size=50257,
        hidden_size=12288,
        num_layers=96,
        num_attention_heads=96,
        head_dim=128,
        sequence_length=2048,
    )
    assert flops == 6 * (96 * block + 50257 * 12288) + 12 * 96 * 96 * 128 * 2048
    assert 1.0 < flops / (6 * 174.6e9) < 1.05


def test_llama_2_7b_parameters() -> None:
    block = decoder_block_parameters(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32, head_dim=128
    )
    # 6,738,415,616 in all, less embedding and head (2 x 32000 x 4096) and 65 norms of 4096.
    assert 32 * block == 6_738_415_616 - 2 * 32000 * 4096 - 65 * 4096


def test_agrees_with_torchs_counter() -> None:
    """Count a small grouped-query decoder, forward and backward, independently of the formula."""
    hidden, inner, heads, kv_heads, head_dim, layers, vocabulary, length = 32, 80, 4, 2, 8, 3, 100, 16
    shapes = [(hidden, heads * head_dim), (hidden, kv_heads * head_dim), (hidden, kv_heads * head_dim)]
    shapes += [(heads * head_dim, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
    blocks = [[torch.randn(shape, requires_grad=True) for shape in shapes] for _ in range(layers)]
    head = torch.randn(hidden, vocabulary, requires_grad=True)
    embedded = torch.randn(length, hidden, requires_grad=True)  # [sequence, hidden]
    with FlopCounterMode(display=False) as counter:
        x = embedded
        for query, key, value, output, gate, up, down in blocks:
            q = (x @ query).view(length, heads, head_dim).transpose(0, 1)
            k = (x @ key).view(length, kv_heads, head_dim).transpose(0, 1).repeat_interleave(heads // kv_heads, 0)
            v = (x @ value).view(length, kv_heads, head_dim).transpose(0, 1).repeat_interleave(heads // kv_heads, 0)
            attended = (q @ k.transpose(1, 2)).softmax(-1) @ v
            x = x + attended.transpose(0, 1).reshape(length, heads * head_dim) @ output
            x = x + (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down
        (x @ head).sum().backward()
    block = decoder_block_parameters(
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )
    per_token = training_flops_per_token(
        num_non_embedding_parameters=layers * block,
        vocabulary_size=vocabulary,
        hidden_size=hidden,
        num_layers=layers,
        num_attention_heads=heads,
        head_dim=head_dim,
        sequence_length=length,
    )
    assert counter.get_total_flops() == per_token * length
