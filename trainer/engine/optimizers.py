"""From the recipe's optimizer section to a torch optimizer. torch's own are used: nothing is compiled at start."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from trainer.config.optimizer import OptimizerConfig
from trainer.optim.groups import GroupSettings, group_settings
from trainer.optim.table import TABLE

NamedParameters = Iterable[tuple[str, nn.Parameter]]
Masters = Iterable[tuple[torch.Tensor, int]]
"""What torch's optimizer steps on, and the number of its parameter group."""


def build_optimizer(
    config: OptimizerConfig, parameters: NamedParameters, device: torch.device, whole: NamedParameters | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer over trainable parameters, grouped by weight decay and learning rate.

    ``whole``: the parameters of the whole model where ``parameters`` are those of a pipeline stage.
    """
    spec = TABLE[config.name]
    settings = spec.hyperparameters(config) | {"weight_decay": 0.0}
    if spec.fused and device.type in ("cpu", "cuda"):
        settings["fused"] = True
    module, name = spec.implementation.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)(parameter_groups(parameters, config, whole), **settings)


def parameter_groups(
    named: NamedParameters, config: OptimizerConfig, whole: NamedParameters | None = None
) -> list[dict[str, Any]]:
    """Split trainable parameters by how they are trained; groups that the whole model lacks are left out.

    DeepSpeed reduces norms group by group, over the ranks of all stages: every stage needs the same groups. One that
    has nothing for a group gets a parameter that nothing uses.
    """
    groups = _grouped(named, config)
    used = groups if whole is None else _grouped(whole, config)
    sample = next(parameter for parameters in groups.values() for parameter in parameters)
    return [
        {
            "params": groups.get(key) or [nn.Parameter(torch.zeros_like(sample.detach().flatten()[:1]))],
            "weight_decay": key[0].weight_decay,
            "learning_rate_ratio": key[0].learning_rate_ratio,
            "orthogonal": key[0].orthogonal,
            **({"moe": True, "name": key[1]} if key[1] else {}),
        }
        for key in sorted(used, reverse=True)
    ]


def _grouped(named: NamedParameters, config: OptimizerConfig) -> dict[tuple[GroupSettings, str], list[nn.Parameter]]:
    """Group by settings and, where experts are spread over ranks, by what DeepSpeed calls those ranks."""
    groups: dict[tuple[GroupSettings, str], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            # ZeRO-3 leaves an empty tensor behind; the true shape is kept beside it.
            ndim = len(getattr(parameter, "ds_shape", parameter.shape))
            key = group_settings(name, ndim, config), getattr(parameter, "group_name", "")
            groups.setdefault(key, []).append(parameter)
    return groups


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the schedule's learning rate, times each group's own ratio."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["learning_rate_ratio"]


def initialise_state(config: OptimizerConfig, optimizer: torch.optim.Optimizer, masters: Masters) -> None:
    """Create the state torch would create at the first step, so that it can be saved and loaded before one.

    A step vetoed at the very start then leaves the same state as one that was never taken.
    """
    spec = TABLE[config.name]
    current = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in [p for p in optimizer.state if id(p) not in current]:
        del optimizer.state[parameter]  # made for parameters that DeepSpeed has put flat ones in place of
    for parameter, group in masters:
        state = optimizer.state[parameter]
        if state:
            continue
        orthogonal = optimizer.param_groups[group]["orthogonal"]
        if spec.counts_steps and not orthogonal:  # the fused step keeps its count on the parameter's device
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for key in spec.torch_state_keys(config, orthogonal).values():
            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def set_optimizer_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Set the number of applied steps, which AdamW's bias correction uses."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(float(steps))


class MasterState:
    """The master weights torch's optimizer steps on, with what it keeps about them, under the names of a checkpoint."""

    def __init__(self, config: OptimizerConfig, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        spec = TABLE[config.name]
        self._torch_keys = spec.torch_state_keys(config) | spec.torch_state_keys(config, orthogonal=True)

    def of(self, master: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``weight`` and the optimizer's tensors of one master tensor, each of its shape."""
        state = self.optimizer.state[master]
        kept = {key: state[name] for key, name in self._torch_keys.items() if name in state}
        return {"weight": master.detach()} | kept
