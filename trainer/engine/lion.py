"""Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675, algorithm 2).

torch has none, and DeepSpeed's are compiled at the first use, one for CPUs and one for CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """The sign of a mix of momentum and gradient is the step; weight decay is decoupled."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        del closure
        for group in self.param_groups:
            mix, decay = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                momentum = state["exp_avg"]
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                parameter.sub_(momentum.lerp(parameter.grad, 1.0 - mix).sign_(), alpha=group["lr"])
                momentum.lerp_(parameter.grad, 1.0 - decay)
