"""Counts and losses of a step over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import distributed

from trainer.data.batches import DIGEST_BITS, MicroBatch
from trainer.engine.base import Requests, StepPreview
from trainer.engine.gate import Reading


class StepTotals:
    """Made before the first forward pass, when the target tokens of the global batch are counted by all ranks.

    ``counts`` is False on ranks whose sequences another rank counts: later stages of a pipeline.
    """

    def __init__(
        self,
        batches: Sequence[MicroBatch],
        num_sources: int,
        requests: Requests,
        device: torch.device,
        *,
        counts: bool = True,
    ) -> None:
        self._num_sources = num_sources
        self.targets = [batch.targets.to(device, non_blocking=True) for batch in batches]
        self.sources = [_sources_of(batch, device) for batch in batches]
        counted = torch.zeros(num_sources, dtype=torch.int64, device=device)
        corrupt = digest = 0
        if counts:
            for source, target in zip(self.sources, self.targets, strict=True):
                counted.index_add_(0, source, (target >= 0).sum(dim=1))
            corrupt, digest = sum(b.num_corrupt for b in batches), sum(b.digest for b in batches)
        asked = [int(requests.stop), int(requests.by_person), int(requests.save), requests.log_level]
        self._totals = torch.cat([counted, torch.tensor([*asked, corrupt, digest], device=device)])
        distributed.all_reduce(self._totals)
        self.target_tokens = self._totals[:num_sources].sum().clamp(min=1).float()
        """Of the global batch; at least 1."""
        self.loss_sums = torch.zeros(num_sources, dtype=torch.float64, device=device)
        """Of this rank so far, a source."""

    def add_losses(self, index: int, losses: torch.Tensor) -> None:
        """Add the loss of each row of micro-batch ``index``, [micro]."""
        self.loss_sums.index_add_(0, self.sources[index], losses.detach().double())

    def reduce_losses(self) -> None:
        """Sum the losses over all ranks."""
        distributed.all_reduce(self.loss_sums)

    def read(self, norm: torch.Tensor | float) -> Reading:
        """Read loss, gradient norm and counts at once: the one device-to-host read of a step."""
        first = torch.as_tensor(norm, dtype=torch.float64, device=self._totals.device).reshape(1)
        # A float64 holds every count and a digest of 48 bits exactly.
        self._totals[-1] %= 1 << DIGEST_BITS
        grad_norm, *values = torch.cat([first, self.loss_sums, self._totals.double()]).tolist()
        losses = tuple(values[: self._num_sources])
        counts = [int(value) for value in values[self._num_sources :]]
        counted, rest = counts[: self._num_sources], counts[self._num_sources :]
        mean = sum(losses) / max(1, sum(counted))
        return Reading(StepPreview(mean, grad_norm), losses, tuple(counted), *rest)


def _sources_of(batch: MicroBatch, device: torch.device) -> torch.Tensor:
    if batch.sources is None:
        return torch.zeros(len(batch.targets), dtype=torch.int64, device=device)
    return batch.sources.to(device, non_blocking=True)
