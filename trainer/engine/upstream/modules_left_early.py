"""Forget the modules that recomputations have left early (DeepSpeed 0.19.8).

ZeRO-3 puts a module on a list before its forward pass and takes one off behind it. torch's checkpoints end a
recomputation, by an exception, as soon as it has made what it is for, so that the module it is in stays on the list:
one or more a block and micro-batch, one a tile of an MLP, for as long as the run lives. Test:
tests/distributed/test_upstream.py.
"""

from __future__ import annotations

from deepspeed.runtime.zero import parameter_offload


def forget() -> None:
    """Leave the whole model, which is first on the list, alone on it. To be called between steps."""
    del parameter_offload.FWD_MODULE_STACK[1:]
