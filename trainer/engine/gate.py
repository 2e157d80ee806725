"""What a step is judged by, and the veto before the update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trainer.engine.base import Accept, StepPreview, StepResult


@dataclass(frozen=True)
class Reading:
    """Everything the host reads from the device in a step; the same on every rank."""

    preview: StepPreview
    source_losses: tuple[float, ...]
    source_targets: tuple[int, ...]
    stop_requests: int
    person_requests: int
    save_requests: int
    log_level: int
    corrupt_samples: int
    batch_digest: int


def step_result(
    reading: Reading, applied: bool, forward_backward_seconds: float, optimizer_seconds: float
) -> StepResult:
    """Return what the loop is told of a step."""
    return StepResult(
        loss=reading.preview.loss,
        grad_norm=reading.preview.grad_norm,
        target_tokens=sum(reading.source_targets),
        applied=applied,
        forward_backward_seconds=forward_backward_seconds,
        optimizer_seconds=optimizer_seconds,
        source_losses=reading.source_losses,
        source_targets=reading.source_targets,
        stop_requests=reading.stop_requests,
        person_requests=reading.person_requests,
        save_requests=reading.save_requests,
        log_level=reading.log_level,
        corrupt_samples=reading.corrupt_samples,
        batch_digest=reading.batch_digest,
    )


class Gate:
    """The veto: asked once a step, when the first piece of the optimizer is about to be stepped.

    DeepSpeed steps its optimizer group by group; a refused step hides the gradients from torch's optimizer, which then
    leaves parameters, moments and step count alone. They are put back afterwards: with offload they are kept buffers.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._hidden: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._reading: Reading | None = None
        self._applied = True
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def arm(self, read: Callable[[], Reading], accept: Accept) -> None:
        """Prepare for the coming ``engine.step()``."""
        self._read, self._accept, self._reading = read, accept, None

    def verdict(self, overflow: bool) -> tuple[Reading, bool]:
        """Return what was read and whether the step was applied. Upstream refuses inf and nan by itself."""
        return self._ask(), self._applied and not overflow

    def _ask(self) -> Reading:
        if self._reading is None:
            self._reading = self._read()
            self._applied = self._accept(self._reading.preview)
        return self._reading

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._ask()
        if not self._applied:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._hidden.append((parameter, parameter.grad))
                        parameter.grad = None

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden.clear()
