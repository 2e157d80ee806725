"""DeepSpeed's compiled operations that a run needs: built once, by whoever comes first.

Most runs need none: optimizers are torch's own, and gloo or NCCL move the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from deepspeed.ops.op_builder import AsyncIOBuilder  # type: ignore[attr-defined] # set at run time

from trainer.core.errors import Problem, RecipeError
from trainer.engine.upstream.stale_build_lock import building


def offloaded_to_nvme(deepspeed_json: Mapping[str, Any]) -> list[str]:
    """Return the sections of ``zero_optimization`` that put state on NVMe."""
    zero = deepspeed_json["zero_optimization"]
    return [name for name in ("offload_optimizer", "offload_param") if (zero.get(name) or {}).get("device") == "nvme"]


def build_operations(deepspeed_json: Mapping[str, Any], say: Callable[[str], None] = lambda _: None) -> list[str]:
    """Build and load what the run needs, and return the names. ``say`` is told who is waited for.

    Raises RecipeError where it can't be built here.
    """
    sections = offloaded_to_nvme(deepspeed_json)
    if not sections:
        return []
    if not AsyncIOBuilder().is_compatible(verbose=False):
        rule = "offload to NVMe needs libaio and a C++ compiler on every node, to build DeepSpeed's async_io"
        fix = "install libaio-dev (Debian) or libaio-devel (Red Hat), or set the device to cpu"
        raise RecipeError(Problem(f"zero_optimization.{sections[0]}.device", "nvme", rule, fix))
    with building("async_io", say):
        AsyncIOBuilder().load(verbose=False)  # kept by DeepSpeed: later loads build nothing
    return ["async_io"]
