"""From the recipe's optimizer section to a torch optimizer. torch's own are used: nothing is compiled at start."""

from __future__ import annotations

import torch
from torch import nn

from trainer.config.optimizer import OptimizerConfig
from trainer.optim.groups import decayed


def build_optimizer(config: OptimizerConfig, network: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Return the optimizer over trainable parameters in two groups, decayed and not."""
    groups = parameter_groups(network, config.weight_decay)
    fused = device.type in ("cpu", "cuda")
    if config.name == "adamw":
        return torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, weight_decay=0.0, fused=fused
        )
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, weight_decay=0.0, fused=fused)


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict]:
    """Split trainable parameters by whether they are decayed; empty groups are left out."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            # ZeRO-3 leaves an empty tensor behind; the true shape is kept beside it.
            ndim = len(getattr(parameter, "ds_shape", parameter.shape))
            groups[decayed(name, ndim)].append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decay else 0.0}
        for decay, parameters in groups.items()
        if parameters
    ]


def initialise_state(config: OptimizerConfig, optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor]) -> None:
    """Create the state torch would create at the first step, so that it can be saved and loaded before one.

    A step vetoed at the very start then leaves the same state as one that was never taken.
    """
    for parameter in parameters:
        state = optimizer.state[parameter]
        if state:
            continue
        if config.name == "adamw":
            # fused keeps the count on the parameter's device
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        elif config.momentum:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def set_optimizer_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Set the number of applied steps, which AdamW's bias correction uses."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(float(steps))


STATE_KEYS = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "momentum_buffer": "momentum"}
"""torch's name of a state tensor -> the name in a checkpoint."""
