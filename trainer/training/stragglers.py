"""Which rank is slower than the others: compared every so many steps, by the time of its own work."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import distributed

from trainer.config.watchdog import WatchdogConfig
from trainer.core import phases

_IN_A_ROW = 3
_LEAST_SECONDS = 0.01
"""A smaller difference a step is noise, whatever the factor."""


@dataclass(frozen=True)
class Comparison:
    """The ranks' own work in a step, mean over the steps since the comparison before."""

    slowest_seconds: float
    median_seconds: float
    slowest_rank: int


class Stragglers:
    """Compares ranks; called by all together after each step.

    Own work is the time of a step less that in collectives, where a rank waits for others. On GPUs collectives return
    before they are done, so that only what delays the host (data, Python, the CPU) tells ranks apart there.
    """

    def __init__(
        self, settings: WatchdogConfig, device: torch.device, hosts: Sequence[str], say: Callable[[str], None]
    ) -> None:
        """``hosts`` are the ranks' hosts, ``say`` is told of a slow one on rank 0."""
        self._settings, self._device, self._hosts, self._say = settings, device, hosts, say
        self._seconds, self._steps, self._waited = 0.0, 0, phases.board.waited_seconds
        self._slow_rank, self._times = -1, 0
        self.newest: Comparison | None = None
        """The last comparison, None before the first."""

    def observe(self, step_seconds: float) -> None:
        """Count a step; compare if it is time. Collective."""
        self._seconds += step_seconds
        self._steps += 1
        if len(self._hosts) < 2 or self._steps < self._settings.straggler_steps:
            return
        waited = phases.board.waited_seconds
        own = max(0.0, self._seconds - (waited - self._waited)) / self._steps
        mine = torch.tensor([own], dtype=torch.float64, device=self._device)
        everyones = [torch.empty_like(mine) for _ in self._hosts]
        distributed.all_gather(everyones, mine)
        self._judge(torch.cat(everyones).tolist())
        self._seconds, self._steps, self._waited = 0.0, 0, phases.board.waited_seconds

    def _judge(self, seconds: list[float]) -> None:
        median, slowest = statistics.median_low(seconds), max(seconds)
        rank = seconds.index(slowest)
        self.newest = Comparison(slowest, median, rank)
        slow = slowest > self._settings.straggler_factor * median and slowest - median > _LEAST_SECONDS
        self._times = self._times + 1 if slow and rank == self._slow_rank else int(slow)
        self._slow_rank = rank if slow else -1
        if self._times == _IN_A_ROW:
            self._say(
                f"warning: rank {rank} on {self._hosts[rank]} is slow: its own work takes {slowest:.3g} s a step, "
                f"that of most ranks {median:.3g} s"
            )
