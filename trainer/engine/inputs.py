"""What a Hugging Face causal LM is called with for a micro-batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainer.data.batches import MicroBatch


def model_inputs(batch: MicroBatch, network: nn.Module, device: torch.device) -> dict[str, torch.Tensor | int]:
    """Return the keyword arguments of the model's forward pass.

    Where attention stays inside documents, position ids that restart are all transformers needs: its eager, SDPA and
    flex masks are derived from them on the device (``masking_utils.find_packed_sequence_indices``). FlashAttention
    takes one flattened row and the documents' cumulative lengths instead.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids.to(device, non_blocking=True)}
    if batch.position_ids is None:
        return inputs
    inputs["position_ids"] = batch.position_ids.to(device, non_blocking=True)
    if not str(getattr(network.config, "_attn_implementation", "")).startswith("flash"):
        return inputs
    lengths = batch.cumulative_lengths
    longest = int(lengths.diff().max())  # on the host, where the batch comes from: no wait for the device
    lengths = lengths.to(device, non_blocking=True)
    flat = {name: values.reshape(1, -1) for name, values in inputs.items()}
    return flat | {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": longest, "max_length_k": longest}
