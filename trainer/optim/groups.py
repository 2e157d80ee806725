"""Which parameters weight decay applies to."""

from __future__ import annotations

import re

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
