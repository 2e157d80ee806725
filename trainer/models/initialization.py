"""Schemes of initial weights beside transformers' own."""

from __future__ import annotations

import math
import re

import torch
from torch import nn
from transformers import PretrainedConfig

# The last matrix of an attention or MLP, whose result is added to the residual stream.
_RESIDUAL = re.compile(
    r"(^|\.)(o_proj|out_proj|down_proj|c_proj|wo|w2|fc2|fc_out|dense_4h_to_h|attention\.dense|self_attention\.dense)(\.weight)?$"
)


def residual_factor(config: PretrainedConfig) -> float:
    """Return what weights that write to the residual stream are multiplied with (Radford et al. 2019, section 2.3)."""
    return 1.0 / math.sqrt(2 * config.get_text_config().num_hidden_layers)


def scale_residual(module: nn.Module, prefix: str, factor: float) -> int:
    """Scale the matrices of one module that write to the residual stream; return how many there were."""
    found = 0
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim >= 2 and _RESIDUAL.search(f"{prefix}.{name}"):
            with torch.no_grad():
                parameter.mul_(factor)
            found += 1
    return found
