"""Import DeepSpeed's Muon without loading torch's compiler (DeepSpeed 0.19.8).

``deepspeed.initialize`` imports Muon to ask whether the optimizer is one; the module decorates three functions with
``torch.compile`` and so loads the whole of inductor: 1.5 s of CPU on every rank of every start, for nothing.
Test: tests/distributed/test_upstream.py.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

MODULE = "deepspeed.runtime.zero.muon.original_muon"


def install() -> None:
    """Import the module with ``torch.compile`` put off to the first call of what it decorates."""
    compile_now = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return lambda decorated: compile_later(decorated, **options)
        compiled = functools.cache(lambda: compile_now(function, **options))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = compile_later
    try:
        importlib.import_module(MODULE)
    finally:
        torch.compile = compile_now
