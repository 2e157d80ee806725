"""Give what a model holds for each token more rows: embedding, head and its bias."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers import PretrainedConfig

_AT_A_TIME = 8192
"""Rows that are summed in float64 at a time: a whole vocabulary in float64 would take gigabytes."""


def with_rows(tensor: torch.Tensor, shape: Sequence[int], num_new: int) -> torch.Tensor:
    """Return ``tensor`` with rows added up to ``shape``: first ``num_new`` new tokens, then padding.

    A new token gets the mean of the rows there are (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html,
    without the noise of transformers' ``mean_resizing``), padding gets zeros. A tensor of that shape is returned as it
    is. Raises ValueError where ``shape`` has fewer rows or differs in more than rows.
    """
    num_rows = tensor.shape[0] if tensor.dim() else 0
    if tensor.shape == tuple(shape):
        return tensor
    if tensor.shape[1:] != tuple(shape[1:]) or shape[0] < num_rows + num_new:
        raise ValueError(f"rows can't be added to {list(tensor.shape)} to make it {list(shape)}")
    total = sum(rows.sum(dim=0, dtype=torch.float64) for rows in tensor.split(_AT_A_TIME))
    grown = tensor.new_zeros(shape)
    grown[:num_rows] = tensor
    grown[num_rows : num_rows + num_new] = total / num_rows
    return grown


def config_of_files(config: PretrainedConfig, vocabulary_size: int) -> PretrainedConfig:
    """Return ``config`` as the files know it, before tokens were added: with ``vocabulary_size``."""
    own = copy.deepcopy(config)
    text = own.get_text_config()
    text.vocab_size = vocabulary_size
    if (
        getattr(text, "pad_token_id", None) or 0
    ) >= vocabulary_size:  # an added token; torch refuses an embedding that lacks it
        text.pad_token_id = None
    return own
