"""Pipeline stages with ZeRO 0-1 through DeepSpeed's pipeline engine."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import distributed, nn

from trainer.config.optimizer import OptimizerConfig
from trainer.core import phases
from trainer.data.batches import MicroBatch
from trainer.engine.base import Accept, Requests, StateReader, StateSlice, StepResult
from trainer.engine.gate import Gate, Reading, step_result
from trainer.engine.inputs import model_inputs
from trainer.engine.muon import Muon
from trainer.engine.norm import gradient_norm
from trainer.engine.optimizers import MasterState, initialise_state, set_learning_rate
from trainer.engine.pipeline_marks import MicroBatchMarks
from trainer.engine.pipeline_module import MicroBatches
from trainer.engine.replicas import replica_digests
from trainer.engine.state import load_slices
from trainer.engine.state_replicated import ReplicatedState, owns_on_tensor_rank, persistent_buffers, replicated_tensors
from trainer.engine.state_zero12 import FlatPartitionState
from trainer.engine.totals import StepTotals
from trainer.engine.upstream.changed_accumulation import set_accumulation
from trainer.models.loss import LossSpec
from trainer.models.stages import StagePart
from trainer.parallel.topology import Topology


@dataclass(frozen=True)
class WholeModel:
    """What every rank knows of the model it holds a stage of."""

    shapes: Mapping[str, tuple[int, ...]]
    """Parameters and persistent buffers by Hugging Face name."""
    num_parameters: int
    """Tied ones counted once."""
    division: list[str]
    """What each stage holds, in words."""


class StagedEngine:
    """Implements TrainEngine for one pipeline stage of one data-parallel replica.

    All stages of a replica read the same micro-batches: only hidden states travel between them.
    """

    def __init__(
        self,
        engine: PipelineEngine,
        network: nn.Module,
        part: StagePart,
        whole: WholeModel,
        topology: Topology,
        batches: MicroBatches,
        loss: LossSpec,
        optimizer: OptimizerConfig,
        num_sources: int,
    ) -> None:
        self._engine = engine
        self._network = network
        self._part = part
        self._whole = whole
        self._topology = topology
        self._place = topology.place(distributed.get_rank())
        self._batches = batches
        self._loss = loss
        text = cast("Any", network).config.get_text_config()
        self._auxiliary_coefficient: float = getattr(text, "router_aux_loss_coef", None) or 0.0
        self._num_sources = num_sources
        self._base = cast("torch.optim.Optimizer", engine.basic_optimizer)
        self._device = cast("torch.device", engine.device)
        self._parameters = part.parameters(network)
        owns = owns_on_tensor_rank(self._parameters, self._place.tensor, part.owns)
        masters = MasterState(optimizer, self._base)
        if engine.optimizer is self._base:
            self._state = ReplicatedState(self._parameters, masters, self._place.data, topology.data, owns)
        else:
            self._state = FlatPartitionState(
                self._parameters, engine.optimizer, masters, engine.zero_optimization_stage() == 0,
                self._place.data, topology.data, owns,
            )  # fmt: skip
        initialise_state(optimizer, self._base, self._state.masters())
        if isinstance(self._base, Muon):
            stage = engine.zero_optimization_stage()
            self._base.attach(self._state, cast("Any", engine).seq_data_parallel_group if stage else None)
        self._clip_norm = optimizer.clip_norm
        self._plain_norm: torch.Tensor | None = None
        if engine.optimizer is self._base:
            # DeepSpeed's own clips every stage by the norm of that stage.
            engine.clip_fp32_gradients = self._clip_whole_model
        self._gate = Gate(self._base)
        self._marks = MicroBatchMarks(engine)
        self._shape: tuple[int, ...] | None = None

    @property
    def device(self) -> torch.device:
        """Where batches are wanted."""
        return self._device

    def logical_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the global shape of every parameter and persistent buffer of the whole model."""
        return dict(self._whole.shapes)

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, tied ones counted once."""
        return self._whole.num_parameters

    @property
    def division(self) -> list[str]:
        """How the model is divided, one line a stage."""
        return self._whole.division

    def train_batch(
        self, batches: Sequence[MicroBatch], accept: Accept, learning_rate: float, requests: Requests
    ) -> StepResult:
        """Run one optimizer step. See TrainEngine."""
        started = phases.working_seconds()
        phases.mark("forward")
        set_accumulation(self._engine, len(batches))
        set_learning_rate(self._base, learning_rate)
        totals = StepTotals(
            batches,
            self._num_sources,
            requests,
            self._device,
            counts=self._place.stage == 0 and self._place.tensor == 0,
        )
        # DeepSpeed averages gradients over replicas and micro-batches: undo that, then divide by the global count.
        scale = self._topology.data * len(batches) / totals.target_tokens

        def loss_of(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
            def loss(logits: torch.Tensor) -> torch.Tensor:
                targets = totals.targets[index]
                losses = self._loss.function(logits.view(*targets.shape, -1), targets)
                if self._place.tensor == 0:  # its other ranks compute the same
                    totals.add_losses(index, losses)
                auxiliary = self._batches.auxiliary
                if auxiliary is None:
                    return losses.sum() * scale
                # A mean over a micro-batch: DeepSpeed makes it one over all of the step's.
                return losses.sum() * scale + self._auxiliary_coefficient * auxiliary

            return loss

        boundary = started

        def read() -> Reading:
            nonlocal boundary
            phases.mark("optimizer")
            boundary = phases.working_seconds()
            norm = self._grad_norm()
            totals.reduce_losses()
            return totals.read(norm)

        self._gate.arm(read, accept)
        self._expect(batches[0])
        with self._marks.step():
            self._engine.train_batch(
                self._batches.begin(
                    [self._inputs(batch) for batch in batches], [loss_of(i) for i in range(len(batches))]
                )
            )
        reading, applied = self._gate.verdict(overflow=getattr(self._engine.optimizer, "overflow", False))
        return step_result(reading, applied, boundary - started, phases.working_seconds() - boundary)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> tuple[float, int]:
        """Return the summed loss and target count on the last stage, nothing on others. See TrainEngine."""
        targets = [batch.targets.to(self._device) for batch in batches]

        def loss_of(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
            shape = targets[index].shape
            return lambda logits: self._loss.function(logits.view(*shape, -1), targets[index]).sum()

        self._expect(batches[0])
        feed = self._batches.begin(
            [self._inputs(batch) for batch in batches], [loss_of(index) for index in range(len(batches))]
        )
        losses: Any = cast("Any", self._engine).eval_batch(
            feed, reduce_output=None, bcast_loss=False, num_micro_batches=len(batches)
        )
        if not self._part.is_last or self._place.tensor:
            return 0.0, 0
        return sum(float(loss) for loss in losses), sum(int((target >= 0).sum()) for target in targets)

    def iterate_state(self) -> Iterator[StateSlice]:
        """Yield trained parameters with their optimizer state, then frozen parameters and persistent buffers."""
        yield from self._state.slices()
        extra: list[tuple[str, torch.Tensor]] = list(persistent_buffers(self._network))
        extra += [(name, p) for name, p in self._parameters if not p.requires_grad]
        owns = owns_on_tensor_rank(extra, self._place.tensor, self._part.owns)
        yield from replicated_tensors(extra, self._place.data, self._topology.data, owns)

    def load_state(self, reader: StateReader, optimizer_steps: int | None) -> None:
        """Fill every slice. ``optimizer_steps`` None: weights only, the optimizer starts afresh."""
        load_slices(self.iterate_state(), reader, self._base, optimizer_steps)
        with torch.no_grad():
            self._state.refresh()

    def replica_digests(self) -> dict[str, int]:
        """Digest weights, buffers and what of the optimizer's state has copies. See TrainEngine."""
        stage = self._engine.zero_optimization_stage()
        copied = self._state.slices() if stage == 0 or self._topology.tensor > 1 else ()
        slices = (piece for piece in copied if stage == 0 or piece.cut is None)
        return replica_digests([*self._parameters, *persistent_buffers(self._network)], slices)

    def close(self) -> None:
        """Free the engine's hooks and buffers."""
        self._engine.destroy()
        gc.collect()

    def _inputs(self, batch: MicroBatch) -> dict[str, Any]:
        return model_inputs(batch, self._network, self._device)

    def _expect(self, batch: MicroBatch) -> None:
        """Tell DeepSpeed when hidden states change their shape: it sends shapes only once."""
        shape = tuple(batch.input_ids.shape)
        if shape != self._shape:
            self._engine.reset_activation_shape()
            self._shape = shape

    def _clip_whole_model(self) -> None:
        self._plain_norm = self._norm_of_all_stages()
        gradients = [p.grad for _, p in self._parameters if p.grad is not None]
        # clip_grad_norm_ computes min(1, clip / (norm + 1e-6)); the same here, with the norm of all stages
        factor = torch.clamp(self._clip_norm / (self._plain_norm + 1e-6), max=1.0)
        for gradient in gradients:
            gradient.mul_(factor)

    def _norm_of_all_stages(self) -> torch.Tensor:
        mine = [p for name, p in self._parameters if self._part.owns(name)]
        several = self._topology.tensor > 1
        tensor_group = cast("Any", self._engine.grid).get_slice_parallel_group() if several else None
        square = gradient_norm(mine, tensor_group, self._device).double().square()
        distributed.all_reduce(square, group=self._engine.grid.get_pipe_parallel_group())
        return square.sqrt().float()

    def _grad_norm(self) -> torch.Tensor | float:
        norm = getattr(self._engine.optimizer, "_global_grad_norm", None)
        if norm is None:
            norm = self._plain_norm
        if norm is None:  # stage 0, float32, no clipping
            norm = self._norm_of_all_stages()
        self._plain_norm = None
        return norm
