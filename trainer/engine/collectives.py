"""Note each collective on the board: which, in what group, the how manieth, and whether it has returned.

The functions of ``torch.distributed`` are replaced by ones that note and call them, in that module's namespace alone:
trainer and DeepSpeed call them through it. What torch calls inside itself is not counted twice.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from trainer.core import phases

_NAMES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor", "broadcast",
    "reduce", "gather", "scatter", "all_to_all", "all_to_all_single", "barrier", "send", "recv", "isend", "irecv",
    "batch_isend_irecv", "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list",
)  # fmt: skip
_original: dict[str, Callable[..., Any]] = {}


def install() -> None:
    """Begin to note. Before DeepSpeed joins the group: it keeps some of these functions. May be called twice."""
    for name in _NAMES:
        if name not in _original:
            _original[name] = getattr(distributed, name)
            setattr(distributed, name, _noting(name, _original[name]))


def undo() -> None:
    """Put torch's own functions back."""
    for name, function in _original.items():
        setattr(distributed, name, function)
    _original.clear()


def _noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first, *_ = inspect.signature(function).parameters  # "tensor", "output_tensor", ...

    @functools.wraps(function)
    def noting(*args: Any, **kwargs: Any) -> Any:
        value = args[0] if args else kwargs.get(first)
        group = kwargs.get("group")
        board = phases.board
        call = board.enter(
            name,
            "" if group is None else getattr(group, "group_name", ""),
            value.numel() if isinstance(value, torch.Tensor) else 0,
        )
        # Not in a finally: a call that raised keeps its name on the board, which says what broke.
        result = function(*args, **kwargs)
        board.leave(call)
        return result

    return noting
