"""Which DeepSpeed JSON the run starts from."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from trainer.config.section import Section


class DeepSpeedConfig(Section):
    """``auto`` values of the JSON are filled from the recipe; everything else must agree with it."""

    base: str = "zero1"
    """A name in ds_configs/ (zero0, zero1, zero2, zero3, zero2_offload, zero3_offload, zero3_offload_param,
    zero3_offload_nvme) or a path to your JSON."""
    override: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Keys laid over the base, nested as in the JSON."""
