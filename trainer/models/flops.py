"""FLOPs a model needs per token, counted from its shape: what throughput is measured against."""

from __future__ import annotations


def training_flops_per_token(
    *,
    num_non_embedding_parameters: int,
    vocabulary_size: int,
    hidden_size: int,
    num_layers: int,
    num_attention_heads: int,
    head_dim: int,
    sequence_length: int,
) -> int:
    """Return FLOPs per token of one forward and backward pass, recomputation not counted.

    ``6 N + 12 L H Q T`` of PaLM, appendix B (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311): a weight of a
    matrix costs 2 FLOPs forward and 4 backward; scores and their product with the values cost 4 H Q T forward and
    twice that backward, counted over the whole T x T square as the paper does, also where a mask hides half of it.

    ``num_non_embedding_parameters``: parameters a token is multiplied with inside the blocks (of a mixture of
    experts, the active ones), without input embedding and output head. The head is added here, tied or not:
    looking up an embedding costs nothing, multiplying with it does.
    """
    head_parameters = vocabulary_size * hidden_size
    matrices = 6 * (num_non_embedding_parameters + head_parameters)
    attention = 12 * num_layers * num_attention_heads * head_dim * sequence_length
    return matrices + attention


def decoder_block_parameters(
    *,
    hidden_size: int,
    intermediate_size: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    gated_mlp: bool = True,
) -> int:
    """Return the matrix parameters of one decoder block: attention (grouped queries) and MLP, no biases or norms."""
    attention = hidden_size * head_dim * (2 * num_attention_heads + 2 * num_key_value_heads)
    return attention + (3 if gated_mlp else 2) * hidden_size * intermediate_size
