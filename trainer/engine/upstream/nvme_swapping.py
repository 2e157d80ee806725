"""Make offload to NVMe read what was written (DeepSpeed 0.19.8).

1. Gradients on NVMe are read to where they lie in their sub-group. Direct reads want an address that is a multiple of
   512; elsewhere they fail without a word, and the gradient of, say, the head is zero: it is never trained.
2. Parameters are read ahead in the order of the last step, where a parameter stands twice when its forward and backward
   pass follow each other, as the head's do: "param already assigned swap buffer".

Test: tests/distributed/test_nvme.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper
from deepspeed.runtime.swap_tensor.partitioned_optimizer_swapper import PartitionedOptimizerSwapper
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper

ALIGNMENT = 512
"""Bytes: what direct reads want, O_DIRECT_ALIGNMENT upstream."""


def install() -> None:
    """Replace the two methods, once."""
    if PartitionedOptimizerSwapper._swap_in_gradients is not _swap_in_gradients:
        PartitionedOptimizerSwapper._swap_in_gradients = _swap_in_gradients
        AsyncPartitionedParameterSwapper.swap_in = _swap_in_once


_swap_in_aligned = PartitionedOptimizerSwapper._swap_in_gradients
_swap_in = AsyncPartitionedParameterSwapper.swap_in


def _swap_in_gradients(self: Any, aio_handle: Any, parameter: torch.Tensor, dest_buffer: torch.Tensor) -> None:
    _swap_in_aligned(self, aio_handle, parameter, dest_buffer)
    held = self.swap_params_info.get(OptimizerSwapper.parameter_id(parameter))
    for piece in held.swapped_gradients.values() if held else ():
        assert parameter.grad is not None
        place = parameter.grad.narrow(0, piece.offset, piece.length)
        if place.data_ptr() % ALIGNMENT:
            place.copy_(read_buffered(Path(piece.path), piece.length, place.dtype))


def read_buffered(path: Path, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the first ``count`` elements of a file, read as any file is. Raises OSError if it is shorter."""
    content = bytearray(count * dtype.itemsize)
    with path.open("rb") as file:
        found = file.readinto(content)
    if found != len(content):
        raise OSError(f"{path} is cut off: {found} of {len(content)} bytes")
    return torch.frombuffer(content, dtype=dtype)


def _swap_in_once(self: Any, params: list[Any], async_op: bool = True, swap_in_buffers: Any = None) -> None:
    _swap_in(self, list({param.ds_id: param for param in params}.values()), async_op, swap_in_buffers)
