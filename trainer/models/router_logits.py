"""Router logits of earlier pipeline stages, which the load-balancing loss of a mixture of experts needs.

The loss is one of all blocks together, so what routers say travels with the hidden states to the last stage, and its
gradient travels back. transformers records router logits with hooks while the base model runs: what arrived is put in
front of what the stage's own blocks record, and the family's own code computes the loss of all of it.

Hidden states and router logits are sent as one tensor: of several, DeepSpeed would run a backward pass each.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.utils import output_capturing

from trainer.core.errors import Problem, RecipeError


class RouterLogits:
    """The router logits of one pass through a stage: those that arrived and those recorded since."""

    def __init__(self, model_type: str, width: int, num_experts: int, dtype: torch.dtype) -> None:
        self._model_type = model_type
        self._width = width
        self._num_experts = num_experts
        self._dtype = dtype
        self.arrived: tuple[torch.Tensor, ...] = ()

    def split(self, received: torch.Tensor) -> torch.Tensor:
        """Return the hidden states [batch, sequence, hidden] in what the stage before sent; keep the rest."""
        logits = received[..., self._width :].flatten(0, 1)
        self.arrived = logits.split(self._num_experts, dim=-1) if logits.shape[-1] else ()
        return received[..., : self._width].to(self._dtype)

    def enter(self) -> None:
        """Have the model find what arrived in front of what the stage's blocks record."""
        self._recorded().extend(self.arrived)

    def join(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return what the next stage is sent. Raises RecipeError if it could not be split again."""
        logits, shape = self._recorded(), hidden_states.shape
        expected = (shape[:2].numel(), self._num_experts)
        if len(shape) != 3 or shape[-1] != self._width or any(tuple(each.shape) != expected for each in logits):
            raise _refused(self._model_type, "has hidden states or router logits of another shape than most")
        # In the widest dtype of all: some families compute router logits in float32.
        return torch.cat([hidden_states, *(each.unflatten(0, shape[:2]) for each in logits)], dim=-1)

    def _recorded(self) -> list[torch.Tensor]:
        return cast("Any", output_capturing._active_collector.get())["router_logits"]


def router_logits_of(network: PreTrainedModel) -> RouterLogits | None:
    """Return what carries a model's router logits from stage to stage, None where its config asks for no such loss."""
    config = network.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return None
    num_experts = getattr(network, "num_experts", None)
    recorded = any("router_logits" in (getattr(m, "_can_record_outputs", None) or ()) for m in network.modules())
    if not recorded or not isinstance(num_experts, int):
        raise _refused(str(config.model_type), "does not record the logits of its routers as most do")
    return RouterLogits(str(config.model_type), config.hidden_size, num_experts, network.dtype)


def _refused(kind: str, rule: str) -> RecipeError:
    rule = f"{kind} {rule}: its load-balancing loss can't be computed over stages"
    fix = "set it to false, or parallel.pipeline to 1"
    return RecipeError(Problem("model.config.output_router_logits", True, rule, fix))
