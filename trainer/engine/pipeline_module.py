"""What DeepSpeed's pipeline engine is given: one stage a rank, its micro-batches and its loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import distributed, nn

from trainer.models.stages import Stage
from trainer.parallel.topology import Place, Topology

_NOTHING = torch.zeros(1)
"""What DeepSpeed is told the micro-batches are: every rank reads its own."""


@dataclass
class MicroBatches:
    """The micro-batches under way. A stage meets them in order, whatever the schedule: 1F1B sends them so."""

    inputs: Iterator[Mapping[str, Any]] = field(default_factory=lambda: iter(()))
    losses: Iterator[Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=lambda: iter(()))
    """One function a micro-batch: logits → scalar loss."""
    auxiliary: torch.Tensor | None = None
    """The load-balancing loss of the micro-batch whose logits are there, on the last stage of a mixture that has it."""

    def begin(
        self, inputs: Sequence[Mapping[str, Any]], losses: Sequence[Callable[[torch.Tensor], torch.Tensor]]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Prepare for a pass over ``inputs``; return what to call the pipeline engine with."""
        self.inputs, self.losses = iter(inputs), iter(losses)
        return iter([(_NOTHING, _NOTHING)] * len(inputs))

    def loss_of_next(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Return the loss of the next micro-batch; DeepSpeed's ``loss_fn``."""
        return next(self.losses)(logits)


class _Turn(nn.Module):
    """Call the stage with the next micro-batch."""

    def __init__(self, stage: Stage, batches: MicroBatches, is_first: bool) -> None:
        super().__init__()
        self.stage = stage
        self._batches = batches
        self._is_first = is_first

    def __repr__(self) -> str:
        return "Stage"  # DeepSpeed prints it

    def forward(self, received: torch.Tensor) -> torch.Tensor:
        output = self.stage(next(self._batches.inputs), None if self._is_first else received)
        self._batches.auxiliary = self.stage.auxiliary
        return output


class StageModule(PipelineModule):
    """A PipelineModule whose stages are built already, one a rank, with tied parameters on the first and last."""

    def __init__(
        self,
        stage: Stage,
        topology: Topology,
        batches: MicroBatches,
        tied: Sequence[nn.Parameter],
        num_tied: int,
    ) -> None:
        self._tied = list(tied)
        self._num_tied = num_tied
        self._mesh = topology
        place = topology.place(distributed.get_rank())
        # The other stages' entries are never built here.
        layers: list[nn.Module] = [nn.Identity() for _ in range(topology.pipeline)]
        layers[place.stage] = _Turn(stage, batches, place.stage == 0)
        super().__init__(
            layers,
            topology=PipeModelDataParallelTopology(
                num_pp=topology.pipeline, num_mp=topology.tensor, num_dp=topology.data
            ),
            loss_fn=batches.loss_of_next,
            partition_method="uniform",
        )

    def adopt(self, parameters: Iterable[nn.Parameter]) -> None:
        """Register parameters of the optimizer that belong to no module: DeepSpeed wants a name for each."""
        known = set(map(id, self.parameters()))
        for number, parameter in enumerate(p for p in parameters if id(p) not in known):
            self.register_parameter(f"unused_{number}", parameter)

    def _index_tied_modules(self) -> dict[str, Any]:
        """Make the groups over which gradients of tied parameters are summed; count them once in the norm."""
        place = self._mesh.place(distributed.get_rank())
        self._tied_group: Any = None
        if self._num_tied:
            # every rank makes every group: new_group is collective
            for data, tensor in itertools.product(range(self._mesh.data), range(self._mesh.tensor)):
                ends = [Place(stage, data, tensor=tensor) for stage in (0, self._mesh.pipeline - 1)]
                group = distributed.new_group([self._mesh.rank(end) for end in ends])
                if (data, tensor) == (place.data, place.tensor):
                    self._tied_group = group
        if place.stage > 0:
            for parameter in self._tied:
                parameter.ds_pipe_replicated = True  # type: ignore[attr-defined]
        return {}  # upstream's table describes tied modules; ours are parameters of different modules

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
        """Return what DeepSpeed reduces after the last backward pass."""
        return [(parameter, self._tied_group) for parameter in self._tied if parameter.requires_grad]
