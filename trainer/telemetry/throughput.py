"""Where the time of a step goes, how fast the run is, and how much of the hardware it uses."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from trainer.core.phases import working_seconds

Phase = Literal["data_wait", "forward_backward", "optimizer"]
_OTHER = "other"


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step on this rank. The four parts add up to ``step_seconds``."""

    step_seconds: float
    data_wait_seconds: float
    forward_backward_seconds: float
    optimizer_seconds: float
    other_seconds: float


class StepClock:
    """Split the wall time of a step into phases.

    A phase inside another is taken out of the outer one, so an engine may time ``optimizer`` within the caller's
    ``forward_backward``. Host time: on a GPU a phase ends when its kernels are queued, unless it reads a result. What
    the process was suspended for belongs to no phase.
    """

    def __init__(self, clock: Callable[[], float] = working_seconds) -> None:
        self._clock = clock
        self._stack: list[str] = [_OTHER]
        self.start_step()

    def start_step(self) -> None:
        """Begin a step: time since the last one (evaluation, checkpoint) is not counted."""
        self._seconds = {_OTHER: 0.0, "data_wait": 0.0, "forward_backward": 0.0, "optimizer": 0.0}
        self._mark = self._clock()

    @contextmanager
    def phase(self, name: Phase) -> Generator[None]:
        """Charge the time of the block to ``name``."""
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def finish_step(self) -> StepTimes:
        """Return the times since :meth:`start_step` and begin the next step."""
        self._charge()
        seconds = self._seconds
        times = StepTimes(
            step_seconds=sum(seconds.values()),
            data_wait_seconds=seconds["data_wait"],
            forward_backward_seconds=seconds["forward_backward"],
            optimizer_seconds=seconds["optimizer"],
            other_seconds=seconds[_OTHER],
        )
        self.start_step()
        return times

    def _charge(self) -> None:
        now = self._clock()
        self._seconds[self._stack[-1]] += now - self._mark
        self._mark = now


class Stopwatch:
    """Add up the wall time of the blocks that are entered with it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._entered = 0.0

    def __enter__(self) -> Stopwatch:
        self._entered = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._entered


class MovingRate:
    """Amount per second over the last ``window`` observations."""

    def __init__(self, window: int = 50) -> None:
        self._observations: deque[tuple[float, float]] = deque(maxlen=window)

    def observe(self, amount: float, seconds: float) -> None:
        """Add ``amount`` done in ``seconds``."""
        self._observations.append((amount, seconds))

    @property
    def per_second(self) -> float | None:
        """The rate; None until some time has passed."""
        seconds = sum(seconds for _, seconds in self._observations)
        return sum(amount for amount, _ in self._observations) / seconds if seconds > 0 else None

    def seconds_for(self, amount: float) -> float | None:
        """Return the time ``amount`` takes at this rate: the ETA. None while the rate is unknown or zero."""
        rate = self.per_second
        return amount / rate if rate else None


# Dense (no sparsity) bfloat16 tensor throughput with float32 accumulation, FLOP/s per device, as the vendors'
# data sheets give it (half of the figures they print "with sparsity"). First match wins; names are those of
# torch.cuda.get_device_name().
_PEAK_FLOPS_PER_SECOND: tuple[tuple[str, float], ...] = (
    (r"\bGB200\b", 2500e12),
    (r"\bB200\b", 2250e12),
    (r"\bH200 NVL\b", 835.5e12),
    (r"\b(H200|GH200)\b", 989.4e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100 NVL\b", 835.5e12),
    (r"\b(H100|H800)\b", 989.4e12),
    (r"\bH20\b", 148e12),
    (r"\b(A100|A800)\b", 312e12),
    (r"\bA10\b", 125e12),
    (r"\bL40S\b", 362.05e12),
    (r"\bL40\b", 181.05e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX 4090$", 165.2e12),
    (r"\b(MI300X|MI325X)\b", 1307.4e12),
    (r"\bMI250X\b", 191.5e12),  # a device is one of the two dies of a card
)


def peak_flops_per_second(device_name: str) -> float | None:
    """Return the dense bfloat16 peak of a device, None where it isn't known (CPU, MIG slices, laptops)."""
    if re.search(r"\bMIG\b|\bLaptop\b", device_name):
        return None
    for pattern, peak in _PEAK_FLOPS_PER_SECOND:
        if re.search(pattern, device_name, re.IGNORECASE):
            return peak
    return None


def model_flops_utilization(
    tokens_per_second: float, flops_per_token: float, num_devices: int, peak_flops: float | None
) -> float | None:
    """Return the share of the devices' peak that went into the model's own FLOPs (PaLM, appendix B).

    ``tokens_per_second`` is of all devices together, ``peak_flops`` of one in FLOP/s; None in, None out.
    """
    if peak_flops is None or num_devices < 1:
        return None
    return tokens_per_second * flops_per_token / (num_devices * peak_flops)


def device_name() -> str:
    """Return the name of this process's accelerator, ``cpu`` without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def peak_memory_bytes() -> int:
    """Return the most memory this process ever held: allocated on its GPU, or resident where there is none."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB, macOS bytes
