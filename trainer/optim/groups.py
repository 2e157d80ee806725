"""Which parameters are trained how: weight decay and learning rate by name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from trainer.config.optimizer import OptimizerConfig

# input_layernorm, ln_f, q_norm, norm1, LayerNorm: as a whole word of the name, so that "normal_proj" is none.
_NORM = re.compile(r"(^|_)((layer|rms|group|batch)_?norm|norm|ln)(\d+|_.*)?$", re.IGNORECASE)
# Per-expert biases are stacked into matrices (gate_up_proj_bias); A_log is the decay rate of a state-space layer.
_VECTOR = re.compile(r"(^|_)bias$|^A_log$")


def decayed(name: str, ndim: int) -> bool:
    """Return whether parameter ``name`` (Hugging Face name) of ``ndim`` dims is decayed.

    Matrices, embeddings and convolutions are; biases, norms and every other vector or scalar are not. ``ndim`` is of
    the whole parameter, not of a ZeRO-3 partition.
    """
    if ndim < 2:
        return False
    words = name.split(".")
    # Only the parameter and the module that holds it count: a Linear inside a norm module is still a matrix.
    return not (_VECTOR.search(words[-1]) or any(_NORM.search(word) for word in words[-2:]))


@dataclass(frozen=True, order=True)
class GroupSettings:
    """What parameters of one optimizer group have in common."""

    weight_decay: float
    learning_rate_ratio: float = 1.0
    orthogonal: bool = False
    """Whether Muon makes the step of each matrix orthogonal."""


def group_settings(name: str, ndim: int, config: OptimizerConfig) -> GroupSettings:
    """Return how parameter ``name`` of ``ndim`` dims is trained: as the first matching group says, else as usual."""
    usual = config.weight_decay if decayed(name, ndim) else 0.0
    orthogonal = config.name == "muon" and hidden_matrix(name, ndim)
    for group in config.groups:
        if re.search(group.pattern, name):
            decay = usual if group.weight_decay is None else group.weight_decay
            return GroupSettings(decay, group.learning_rate_ratio, orthogonal)
    return GroupSettings(usual, orthogonal=orthogonal)


def hidden_matrix(name: str, ndim: int) -> bool:
    """Return whether parameter ``name`` maps hidden states to hidden states, as Muon wants it.

    Matrices of blocks (numbered modules) do, experts stacked into three dims too. Embeddings and the head lie outside
    of blocks; convolutions and embeddings inside have names of their own.
    """
    words = name.split(".")
    if not decayed(name, ndim) or not any(word.isdigit() for word in words):
        return False
    if any(re.search(r"conv|embed|^wte$|^wpe$", word, re.IGNORECASE) for word in words):
        return False
    return ndim == 2 or (ndim == 3 and any("expert" in word for word in words))
