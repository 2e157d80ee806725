"""The optimizers we know: what they are called, what they remember, what they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer.config.optimizer import OptimizerConfig


@dataclass(frozen=True)
class StateKey:
    """One tensor an optimizer keeps per parameter, of the parameter's shape."""

    logical: str
    """Name in our checkpoints."""
    torch: str
    """Key in ``torch.optim.Optimizer.state[parameter]``."""


@dataclass(frozen=True)
class OptimizerSpec:
    """Pure data about one optimizer; trainer/engine/optimizers.py makes the instance."""

    name: str
    """``optimizer.name`` in the recipe."""
    implementation: str
    """Dotted path of the class."""
    state_of: Callable[[OptimizerConfig], tuple[StateKey, ...]]
    hyperparameters: Callable[[OptimizerConfig], dict[str, Any]]
    """Keyword arguments of the torch class."""
    counts_steps: bool
    """Whether the state holds a scalar ``step`` too."""
    fused: bool = True
    """Whether the class has a fused step on CPU and CUDA."""
    orthogonal_state: tuple[StateKey, ...] = ()
    """Of groups with ``orthogonal: True``, in place of ``state_of`` and the step count."""

    def torch_state_keys(self, config: OptimizerConfig, orthogonal: bool = False) -> dict[str, str]:
        """Return logical name -> torch's key of the per-parameter tensors, e.g. {"momentum": "momentum_buffer"}."""
        keys = self.orthogonal_state if orthogonal else self.state_of(config)
        return {key.logical: key.torch for key in keys}


_MOMENTUM = (StateKey("momentum", "momentum_buffer"),)


def _adamw_state(config: OptimizerConfig) -> tuple[StateKey, ...]:
    del config
    return (StateKey("exp_avg", "exp_avg"), StateKey("exp_avg_sq", "exp_avg_sq"))


def _adamw_hyperparameters(config: OptimizerConfig) -> dict[str, Any]:
    return {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
    }


def _sgd_state(config: OptimizerConfig) -> tuple[StateKey, ...]:
    return _MOMENTUM if config.chosen_momentum else ()


def _sgd_hyperparameters(config: OptimizerConfig) -> dict[str, Any]:
    # torch adds SGD's decay to the gradient: the same as decoupled decay only without momentum.
    return {"lr": config.learning_rate, "momentum": config.chosen_momentum, "weight_decay": config.weight_decay}


def _lion_state(config: OptimizerConfig) -> tuple[StateKey, ...]:
    del config
    return (StateKey("exp_avg", "exp_avg"),)


def _lion_hyperparameters(config: OptimizerConfig) -> dict[str, Any]:
    return {"lr": config.learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}


def _adagrad_state(config: OptimizerConfig) -> tuple[StateKey, ...]:
    del config
    return (StateKey("sum", "sum"),)


def _adagrad_hyperparameters(config: OptimizerConfig) -> dict[str, Any]:
    return {"lr": config.learning_rate, "eps": config.epsilon, "weight_decay": config.weight_decay}


def _muon_hyperparameters(config: OptimizerConfig) -> dict[str, Any]:
    return _adamw_hyperparameters(config) | {"momentum": config.chosen_momentum}


TABLE: dict[str, OptimizerSpec] = {
    spec.name: spec
    for spec in (
        OptimizerSpec("adamw", "torch.optim.AdamW", _adamw_state, _adamw_hyperparameters, counts_steps=True),
        OptimizerSpec("sgd", "torch.optim.SGD", _sgd_state, _sgd_hyperparameters, counts_steps=False),
        OptimizerSpec(
            "lion", "trainer.engine.lion.Lion", _lion_state, _lion_hyperparameters, counts_steps=False, fused=False
        ),
        OptimizerSpec(
            "adagrad",
            "trainer.engine.upstream.adagrad.Adagrad",
            _adagrad_state,
            _adagrad_hyperparameters,
            counts_steps=True,
            fused=False,
        ),
        OptimizerSpec(
            "muon",
            "trainer.engine.muon.Muon",
            _adamw_state,
            _muon_hyperparameters,
            counts_steps=True,
            fused=False,
            orthogonal_state=_MOMENTUM,
        ),
    )
}
