"""Adagrad that DeepSpeed leaves alone (DeepSpeed 0.19.8).

ZeRO puts a new ``torch.optim.Adagrad`` in place of one, made of its defaults alone: parameter groups are forgotten
(weight decay, learning rates of their own), the schedule goes on setting the learning rate of an optimizer that steps
nothing, and so does the veto of a bad step. Other classes are kept. Test: tests/distributed/test_upstream.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch.optim.adagrad import adagrad


class Adagrad(torch.optim.Optimizer):
    """torch's, without being an instance of it."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, eps: float = 1e-10, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        del closure
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["sum"] = torch.zeros_like(parameter)
            adagrad(
                parameters,
                [cast("torch.Tensor", p.grad) for p in parameters],
                [self.state[p]["sum"] for p in parameters],
                [self.state[p]["step"] for p in parameters],
                has_sparse_grad=False,
                has_complex=False,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                lr_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )
