"""From the recipe's optimizer section to a torch optimizer. torch's own are used: nothing is compiled at start."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from trainer.config.optimizer import OptimizerConfig
from trainer.optim.groups import decayed
from trainer.optim.table import TABLE

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def build_optimizer(
    config: OptimizerConfig, parameters: NamedParameters, device: torch.device, whole: NamedParameters | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer over trainable parameters in two groups, decayed and not.

    ``whole``: the parameters of the whole model where ``parameters`` are those of a pipeline stage.
    """
    spec = TABLE[config.name]
    settings = spec.hyperparameters(config)
    groups = parameter_groups(parameters, settings.pop("weight_decay"), whole)
    # torch's fused step exists on both; elsewhere its default
    fused = True if device.type in ("cpu", "cuda") else None
    return getattr(torch.optim, spec.torch_class)(groups, weight_decay=0.0, fused=fused, **settings)


def parameter_groups(named: NamedParameters, weight_decay: float, whole: NamedParameters | None = None) -> list[dict]:
    """Split trainable parameters by whether they are decayed; groups that the whole model lacks are left out.

    DeepSpeed reduces norms group by group, over the ranks of all stages: every stage needs the same groups. One that
    has nothing for a group gets a parameter that nothing uses.
    """
    groups = _by_decay(named)
    used = groups if whole is None else _by_decay(whole)
    sample = next(parameter for parameters in groups.values() for parameter in parameters)
    return [
        {
            "params": groups[decay] or [nn.Parameter(torch.zeros_like(sample.detach().flatten()[:1]))],
            "weight_decay": weight_decay if decay else 0.0,
        }
        for decay in (True, False)
        if used[decay]
    ]


def _by_decay(named: NamedParameters) -> dict[bool, list[nn.Parameter]]:
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named:
        if parameter.requires_grad:
            # ZeRO-3 leaves an empty tensor behind; the true shape is kept beside it.
            ndim = len(getattr(parameter, "ds_shape", parameter.shape))
            groups[decayed(name, ndim)].append(parameter)
    return groups


def initialise_state(config: OptimizerConfig, optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor]) -> None:
    """Create the state torch would create at the first step, so that it can be saved and loaded before one.

    A step vetoed at the very start then leaves the same state as one that was never taken.
    """
    spec = TABLE[config.name]
    for parameter in parameters:
        state = optimizer.state[parameter]
        if state:
            continue
        if spec.counts_steps:  # the fused step keeps its count on the parameter's device
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for key in spec.torch_state_keys(config).values():
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
        self._torch_keys = TABLE[config.name].torch_state_keys(config)

    def of(self, master: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``weight`` and the optimizer's tensors of one master tensor, each of its shape."""
        state = self.optimizer.state[master]
        return {"weight": master.detach()} | {key: state[name] for key, name in self._torch_keys.items()}
