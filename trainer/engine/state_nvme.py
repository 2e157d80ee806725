"""State that ZeRO-3 keeps on NVMe: a sub-group's masters and optimizer state are in memory only while they are used."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.core.errors import Problem, RecipeError
from trainer.engine.operations import build_operations, offloaded_to_nvme
from trainer.engine.upstream import nvme_swapping


def prepare_nvme(deepspeed_json: dict[str, Any], largest_parameter: Callable[[], int], world_size: int) -> None:
    """Get ready if state is to lie on NVMe; buffers are made as large as a rank's part of the largest parameter.

    Raises RecipeError if files can't lie there or DeepSpeed can't build what reads and writes them.
    """
    zero = deepspeed_json["zero_optimization"]
    on_nvme = offloaded_to_nvme(deepspeed_json)
    if not on_nvme:
        return
    for name in on_nvme:
        _probe(f"zero_optimization.{name}.nvme_path", Path(zero[name]["nvme_path"]))
    if "offload_param" in on_nvme:
        section = zero["offload_param"]
        needed = -(-largest_parameter() // world_size) + 4096  # parts are padded
        section["buffer_size"] = max(section.get("buffer_size") or 0, needed)
    nvme_swapping.install()
    build_operations(deepspeed_json)


def _probe(key: str, directory: Path) -> None:
    """Make ``directory`` and see that its files can be read and written directly, as libaio does."""
    probe = directory / f"probe-{os.getpid()}"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(probe, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError as error:
        rule = f"can't hold files that are read and written directly on {socket.gethostname()} ({error.strerror})"
        fix = "name a directory of a local disk that you may write to"
        raise RecipeError(Problem(key, str(directory), rule, fix)) from error
    finally:
        probe.unlink(missing_ok=True)


class SwappedGroups:
    """Brings one sub-group at a time into the buffers that DeepSpeed steps in, and lets it go again."""

    def __init__(self, zero_optimizer: Any) -> None:
        self._zero = zero_optimizer
        self._present: int | None = None
        self._changed = False

    def holds(self, group: int) -> bool:
        """Return whether a sub-group lies there: small ones stay in memory."""
        return self._zero._swappable_optimizer_subgroup(group)

    def bring(self, group: int, *, changed: bool = False) -> None:
        """Have a sub-group in memory, no other; ``changed``: it is written back when it is let go."""
        if self._present != group:
            self.settle()
            self._zero._optimizer_states_and_gradient_swap_in(group)
            self._present = group
        self._changed |= changed

    def settle(self) -> None:
        """Let go of the sub-group in memory. A changed one is written back, and copied into the compute weights."""
        if self._present is None:
            return
        if self._changed:
            self._zero._reassign_or_swap_out_partitioned_parameters(self._present)
            self._zero._optimizer_states_and_gradient_swap_out(self._present)
        else:
            self._zero._release_swap_buffers(self._present)
        self._present, self._changed = None, False

    def delete_files(self, parameters: list[Any]) -> None:
        """Delete this rank's files: a run that goes on writes them anew."""
        swappers = [self._zero.optimizer_swapper, *(getattr(p, "nvme_swapper", None) for p in parameters[:1])]
        for folder in [Path(swapper.swap_folder) for swapper in swappers if swapper is not None]:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # the last rank of a node leaves nothing behind
                for parent in list(folder.parents)[:3]:
                    parent.rmdir()


@dataclass(frozen=True)
class SwappedPiece:
    """Implements trainer.engine.base.Swapped."""

    groups: SwappedGroups
    group: int
    view: Callable[[], torch.Tensor]
    """Finds the elements while the sub-group is in memory."""
    count: int

    @property
    def dtype(self) -> torch.dtype:
        """That of masters and their state."""
        return torch.float32

    def numel(self) -> int:
        """Return the number of elements."""
        return self.count

    def fetch(self) -> torch.Tensor:
        """Return the elements."""
        self.groups.bring(self.group)
        return self.view()

    def fill(self, values: torch.Tensor) -> None:
        """Replace the elements."""
        self.groups.bring(self.group, changed=True)
        self.view().copy_(values)
