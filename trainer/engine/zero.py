"""ZeRO 0-3 through DeepSpeed's engine."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups
from torch import distributed, nn

from trainer.config.optimizer import OptimizerConfig
from trainer.core import phases
from trainer.data.batches import MicroBatch
from trainer.engine.base import Accept, Requests, StateReader, StateSlice, StepResult
from trainer.engine.expert_groups import ExpertGroups
from trainer.engine.gate import Gate, step_result
from trainer.engine.inputs import model_inputs
from trainer.engine.muon import Muon
from trainer.engine.norm import gradient_norm
from trainer.engine.optimizers import MasterState, initialise_state, set_learning_rate
from trainer.engine.replicas import replica_digests
from trainer.engine.sequence import local_part
from trainer.engine.state import load_slices
from trainer.engine.state_replicated import (
    ReplicatedState,
    owns_on_tensor_rank,
    persistent_buffers,
    replicated_tensors,
)
from trainer.engine.state_zero3 import Zero3State
from trainer.engine.state_zero12 import FlatPartitionState
from trainer.engine.tensor_groups import TensorGroups
from trainer.engine.totals import StepTotals
from trainer.engine.upstream import modules_left_early
from trainer.engine.upstream.changed_accumulation import set_accumulation
from trainer.models.loss import LossSpec
from trainer.models.shard_sequence import SequenceAttention
from trainer.models.tiling import TiledLoss
from trainer.parallel.cut import whole_shape_of
from trainer.parallel.topology import Topology


class ZeroEngine:
    """Implements TrainEngine for data-parallel ranks."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        loss: LossSpec,
        optimizer: OptimizerConfig,
        stage: int,
        num_sources: int,
        mesh: Topology,
        sequence: SequenceAttention | None = None,
        tensor: TensorGroups | None = None,
        experts: ExpertGroups | None = None,
    ) -> None:
        self._tensor = tensor
        self._experts = experts
        self._sequence = sequence
        self._mesh = mesh
        self._engine = engine
        self._network = cast("nn.Module", engine.module)
        self._loss = loss
        text = cast("Any", self._network).config.get_text_config()
        self._auxiliary_coefficient: float = getattr(text, "router_aux_loss_coef", None) or 0.0
        self._num_sources = num_sources
        self._stage = stage
        self._base = cast("torch.optim.Optimizer", engine.basic_optimizer)
        self._device = cast("torch.device", engine.device)
        self._rank = distributed.get_rank()
        self._place = mesh.place(self._rank)
        # Ranks that hold the same as this one, and its number among them.
        self._replicas = mesh.world_size // mesh.tensor
        self._replica = self._rank // mesh.tensor
        self._state = self._state_access(MasterState(optimizer, self._base))
        initialise_state(optimizer, self._base, self._state.masters())
        if isinstance(self._base, Muon):
            # At stage 0 every rank has all of every matrix.
            self._base.attach(self._state, cast("Any", engine).seq_data_parallel_group if stage else None)
        self._plain_norm: torch.Tensor | None = None
        if stage == 0 and not engine.bfloat16_enabled():
            # DeepSpeed computes this norm only when it clips, and then throws it away.
            self._clip_norm = optimizer.clip_norm
            engine.clip_fp32_gradients = self._clip_and_keep_norm
        self._gate = Gate(self._base)

    @property
    def device(self) -> torch.device:
        """Where batches are wanted."""
        return self._device

    def logical_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the global shape of every parameter and persistent buffer, by Hugging Face name."""
        named = [*self._network.named_parameters(), *persistent_buffers(self._network)]
        return {name: whole_shape_of(tensor) for name, tensor in named}

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, tied ones counted once."""
        return sum(math.prod(whole_shape_of(p)) for p in self._network.parameters())

    @property
    def division(self) -> list[str]:
        """Nothing: every rank runs the whole model."""
        return []

    def train_batch(
        self, batches: Sequence[MicroBatch], accept: Accept, learning_rate: float, requests: Requests
    ) -> StepResult:
        """Run one optimizer step. See TrainEngine."""
        started = phases.working_seconds()
        phases.mark("forward")
        if isinstance(self._state, Zero3State):
            self._state.settle()
        set_accumulation(self._engine, len(batches))
        self._network.train()
        set_learning_rate(self._base, learning_rate)
        parts = [self._local(batch) for batch in batches]
        totals = StepTotals(parts, self._num_sources, requests, self._device, counts=self._place.tensor == 0)
        # DeepSpeed averages gradients over ranks: undo that, then divide by the global count.
        scale = self._replicas / totals.target_tokens
        boundary = started
        for index, batch in enumerate(batches):
            phases.mark("forward", micro_batch=index)
            losses, auxiliary = self._forward(batch, parts[index], totals.targets[index])
            if self._place.tensor == 0:  # its other ranks compute the same
                totals.add_losses(index, losses)
            # An auxiliary loss is a mean over a micro-batch: so is the whole step's over its micro-batches.
            phases.mark("backward", micro_batch=index)
            self._engine.backward(losses.sum() * scale + auxiliary / len(batches), scale_wrt_gas=False)
            if index + 1 == len(batches):
                phases.mark("optimizer")
                totals.reduce_losses()
                boundary = phases.working_seconds()
                self._gate.arm(lambda: totals.read(self._grad_norm()), accept)
            self._engine.step()
        modules_left_early.forget()
        reading, applied = self._gate.verdict(overflow=getattr(self._engine.optimizer, "overflow", False))
        return step_result(reading, applied, boundary - started, phases.working_seconds() - boundary)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> tuple[float, int]:
        """Return this rank's summed loss and target count. See TrainEngine."""
        self._network.eval()
        loss, count = 0.0, 0
        for batch in batches:
            part = self._local(batch)
            targets = part.targets.to(self._device)
            loss += float(self._forward(batch, part, targets)[0].sum())
            count += int((targets >= 0).sum())
        return (loss, count) if self._place.tensor == 0 else (0.0, 0)

    def iterate_state(self) -> Iterator[StateSlice]:
        """Yield trained parameters with their optimizer state, then frozen parameters and persistent buffers."""
        yield from self._state.slices()
        extra = list(persistent_buffers(self._network))
        if self._stage < 3:
            extra += [(name, p) for name, p in self._network.named_parameters() if not p.requires_grad]
        owns = owns_on_tensor_rank(extra, self._place.tensor)
        yield from replicated_tensors(extra, self._replica, self._replicas, owns)

    def load_state(self, reader: StateReader, optimizer_steps: int | None) -> None:
        """Fill every slice. ``optimizer_steps`` None: weights only, the optimizer starts afresh."""
        load_slices(self.iterate_state(), reader, self._base, optimizer_steps)
        with torch.no_grad():
            self._state.refresh()

    def replica_digests(self) -> dict[str, int]:
        """Digest weights, buffers and what of the optimizer's state has copies. See TrainEngine."""
        copied = self._state.slices() if self._stage == 0 or (self._tensor and self._stage < 3) else ()
        slices = (piece for piece in copied if self._stage == 0 or piece.cut is None)
        return replica_digests([*self._network.named_parameters(), *persistent_buffers(self._network)], slices)

    def close(self) -> None:
        """Free the engine's hooks, buffers and files."""
        if isinstance(self._state, Zero3State):
            self._state.delete_files()
        self._engine.destroy()
        groups.mpu = None
        if self._experts:
            self._experts.forget()
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ's: an engine after this one makes its own
        gc.collect()

    def _local(self, batch: MicroBatch) -> MicroBatch:
        """Return what of a micro-batch this rank computes: its part of each sequence, or all."""
        return local_part(batch, self._place.sequence, self._mesh.sequence) if self._mesh.sequence > 1 else batch

    def _forward(
        self, batch: MicroBatch, part: MicroBatch, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Return the loss sum of each row over this rank's ``part`` of the micro-batch, [micro], and what is added.

        A mixture of experts adds its load-balancing loss where its config says ``output_router_logits``.
        """
        if self._sequence is not None:
            packed = batch.position_ids is not None and batch.document_ids is not None
            self._sequence.enter(batch.document_ids.to(self._device) if packed else None)  # type: ignore[union-attr]
        inputs = model_inputs(part, self._network, self._device)
        if isinstance(self._network.forward, TiledLoss):
            losses, auxiliary = self._engine(**inputs, use_cache=False, targets=targets)
        else:
            outputs = self._engine(**inputs, use_cache=False)
            losses = self._loss.function(outputs.logits.view(*targets.shape, -1), targets)
            auxiliary = getattr(outputs, "aux_loss", None)
        if self._sequence is not None:
            self._sequence.leave(str(cast("Any", self._network).config.model_type))
        return losses, self._auxiliary_coefficient * auxiliary if isinstance(auxiliary, torch.Tensor) else 0.0

    def _state_access(self, masters: MasterState) -> ReplicatedState | FlatPartitionState | Zero3State:
        optimizer = self._engine.optimizer
        if self._stage == 3:
            return Zero3State(self._network, optimizer, masters)
        parameters = list(self._network.named_parameters())
        owns = owns_on_tensor_rank(parameters, self._place.tensor)
        if optimizer is self._base:
            return ReplicatedState(parameters, masters, self._replica, self._replicas, owns)
        return FlatPartitionState(parameters, optimizer, masters, self._stage == 0, self._replica, self._replicas, owns)

    def _clip_and_keep_norm(self) -> None:
        trained = [p for p in self._network.parameters() if p.grad is not None]
        self._plain_norm = self._norm_of_whole_model()
        nn.utils.clip_grads_with_norm_(trained, self._clip_norm, self._plain_norm, foreach=False)

    def _norm_of_whole_model(self) -> torch.Tensor:
        group = self._tensor.get_model_parallel_group() if self._tensor else None
        if self._experts:
            group = self._experts.ranks
        return gradient_norm(self._network.parameters(), group, self._device)

    def _grad_norm(self) -> torch.Tensor | float:
        norm = getattr(self._engine.optimizer, "_global_grad_norm", None)
        if norm is None:
            norm = self._plain_norm
        if norm is None:  # stage 0, float32, no clipping
            norm = self._norm_of_whole_model()
        self._plain_norm = None
        return norm
