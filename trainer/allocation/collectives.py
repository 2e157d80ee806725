"""Do collectives of all ranks give the right numbers, how fast are they, and how fast is each rank alone?"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage] - documented there

from trainer.allocation.pairs import Link
from trainer.core.environ import RankEnvironment

_MOST_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
_FIRST_BYTES = 256 * 2**10
_TARGET_SECONDS = 0.1
"""For one message: enough to measure, short enough for a slow link."""
_REPEATS = 4
_ALONE_SECONDS = 0.3


def torch_facts(local_rank: int) -> dict[str, Any]:
    """Return what torch knows of versions and this rank's GPU, for `trainer.allocation.facts.rank_facts`."""
    versions = {"CUDA": torch.version.cuda or "none"}
    if not torch.cuda.is_available():
        return {"versions": versions}
    count = torch.cuda.device_count()
    nccl: Any = importlib.import_module("torch.cuda.nccl")
    versions["NCCL"] = ".".join(map(str, nccl.version()))
    if local_rank >= count:
        return {"versions": versions, "gpu_count": count}
    torch.cuda.set_device(local_rank)
    free, total = torch.cuda.mem_get_info()
    return {"versions": versions, "gpu_count": count, "gpu_free_bytes": free, "gpu_total_bytes": total}


class Group:
    """All ranks, in the backends that training will use. Raises RuntimeError if they can't connect in time."""

    def __init__(self, place: RankEnvironment, store: Store, seconds: float) -> None:
        self.rank, self.world_size = place.rank, place.world_size
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", place.local_rank)
            torch.cuda.set_device(self.device)
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
            store=PrefixStore("trainer-preflight-group", store),
            rank=self.rank, world_size=self.world_size, timeout=timedelta(seconds=seconds),
        )  # fmt: skip

    def close(self) -> None:
        """Leave the group."""
        distributed.destroy_process_group()

    def wrong(self) -> list[str]:
        """Return which collectives gave wrong numbers here. All values are exact in their dtype, so equality counts."""
        ranks, size = self.world_size, 4099  # no multiple of anything
        number = torch.arange(size, device=self.device)
        found: list[str] = []

        def same(name: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
            if not torch.equal(got, wanted):
                found.append(f"{name} of {got.dtype}")

        for dtype in (torch.int64, torch.float32):
            mine = (number % 31 + self.rank).to(dtype)
            total = mine.clone()
            distributed.all_reduce(total)
            same("all_reduce", total, (number % 31 * ranks + ranks * (ranks - 1) // 2).to(dtype))
            parts = [torch.empty_like(mine) for _ in range(ranks)]
            distributed.all_gather(parts, mine)
            wanted = [(number % 31 + rank).to(dtype) for rank in range(ranks)]
            same("all_gather", torch.stack(parts), torch.stack(wanted))
            distributed.broadcast(mine, src=ranks - 1)
            same("broadcast", mine, wanted[-1])
        return found

    def all_reduce_speed(self) -> float:
        """Return the bus bandwidth of an all-reduce in bytes/s: 2 (n - 1) / n of the message, over its time."""
        first = torch.ones(_FIRST_BYTES // 4, device=self.device)
        size = self._size(self._seconds(lambda: distributed.all_reduce(first)))
        message = torch.ones(size // 4, device=self.device)
        seconds = min(self._seconds(lambda: distributed.all_reduce(message)) for _ in range(_REPEATS))
        return 2 * (self.world_size - 1) / self.world_size * size / seconds

    def link_speeds(self, plan: Sequence[Sequence[Link]], ranks_of: Sequence[Sequence[int]]) -> dict[Link, float]:
        """Return bytes/s of the links that end at this rank. Collective.

        ``plan``: rounds of links between nodes; ``ranks_of``: the ranks of each node that take part, equally many. The
        first receives from the first of the other node, the second from the second, all at a time, as each may have a
        network card of its own.
        """
        node = next((n for n, ranks in enumerate(ranks_of) if self.rank in ranks), -1)
        position = ranks_of[node].index(self.rank) if node >= 0 else 0
        speeds: dict[Link, float] = {}
        size, repeats = _FIRST_BYTES, 1
        slowest = 0.0
        # The first pass opens connections and finds out how much can be sent, two more measure.
        for sweep in range(3):
            for links in plan:
                distributed.barrier()
                for link in links:
                    if node == link[0]:
                        self._stream(ranks_of[link[1]][position], size, repeats, sends=True)
                    elif node == link[1]:
                        seconds = self._stream(ranks_of[link[0]][position], size, repeats, sends=False)
                        slowest = max(slowest, seconds)
                        if sweep:
                            speeds[link] = max(speeds.get(link, 0.0), size / seconds)
            if sweep == 0:
                size, repeats = self._size(self._agree(slowest)), _REPEATS
        return speeds

    def _stream(self, peer: int, size: int, repeats: int, *, sends: bool) -> float:
        """Send or receive so many messages, and return the seconds of one, the first not counted."""
        message = torch.ones(size // 4, device=self.device)
        begin = 0.0
        for number in range(repeats + 1):
            if number == 1:  # the first message may have waited for the other side
                begin = time.perf_counter()
            if sends:
                distributed.send(message, peer)
            else:
                distributed.recv(message, peer)
            self._finish()
        return max(1e-9, (time.perf_counter() - begin) / repeats)

    def _size(self, seconds: float) -> int:
        """Return the bytes of a message that takes about the target, if the first one took ``seconds``."""
        wanted = _FIRST_BYTES * _TARGET_SECONDS / max(seconds, 1e-9)
        return int(min(max(wanted, _FIRST_BYTES), _MOST_BYTES[self.device.type])) // 4096 * 4096

    def _agree(self, seconds: float) -> float:
        longest = torch.tensor([seconds], dtype=torch.float64, device=self.device)
        distributed.all_reduce(longest, op=distributed.ReduceOp.MAX)
        return float(longest.item())

    def _seconds(self, action: Callable[[], Any]) -> float:
        """Return how long ``action`` takes on the slowest rank, from a common start."""
        distributed.barrier()
        self._finish()
        begin = time.perf_counter()
        action()
        self._finish()
        return max(1e-9, self._agree(time.perf_counter() - begin))

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def compute_speed(self) -> float:
        """Return FLOP/s of this rank's best matrix product."""
        size, dtype = (8192, torch.bfloat16) if self.device.type == "cuda" else (512, torch.float32)
        left = torch.ones(size, size, dtype=dtype, device=self.device)
        return 2 * size**3 / self._best(lambda: left @ left)

    def copy_speed(self) -> float:
        """Return bytes/s of this rank's best copy in memory, read and written."""
        size = 2**30 if self.device.type == "cuda" else 32 * 2**20
        source = torch.ones(size // 4, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self._best(lambda: target.copy_(source))

    def _best(self, action: Callable[[], Any]) -> float:
        best, until = float("inf"), time.perf_counter() + _ALONE_SECONDS
        while best == float("inf") or time.perf_counter() < until:
            begin = time.perf_counter()
            action()
            self._finish()
            best = min(best, time.perf_counter() - begin)
        return max(best, 1e-9)
