"""Which part of a micro-batch a rank computes where sequences are divided."""

from __future__ import annotations

from dataclasses import replace

import torch

from trainer.data.batches import MicroBatch


def local_part(batch: MicroBatch, rank: int, size: int) -> MicroBatch:
    """Return part ``rank`` of ``size`` of every sequence, with explicit positions.

    The first rank answers for what is counted once a row. Raises ValueError if the sequence can't be divided.
    """
    length = batch.input_ids.shape[1]
    if length % size:
        raise ValueError(f"sequences of {length} tokens can't be divided over {size} ranks")
    part = slice(rank * length // size, (rank + 1) * length // size)
    positions = batch.position_ids
    if positions is None:
        positions = torch.arange(length).expand_as(batch.input_ids)
    return replace(
        batch,
        input_ids=batch.input_ids[:, part].contiguous(),
        targets=batch.targets[:, part].contiguous(),
        position_ids=positions[:, part].contiguous(),
        document_ids=None,
        digest=batch.digest if rank == 0 else 0,
        num_corrupt=batch.num_corrupt if rank == 0 else 0,
    )
