"""What nvidia-smi says of a node's GPUs: who uses them, and whether they are sound."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

_FIELDS = (
    "index", "name", "driver_version", "ecc.errors.uncorrected.volatile.total", "remapped_rows.pending",
    "remapped_rows.failure", "clocks_throttle_reasons.hw_slowdown",
)  # fmt: skip
_SECONDS = 15.0
"""A driver in trouble lets nvidia-smi hang."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU of a node."""

    index: int
    name: str
    driver: str
    uncorrected_errors: int = 0
    """ECC errors since the driver was loaded."""
    rows_to_remap: bool = False
    """Memory is to be, or could not be, remapped: it needs a reset, or to be replaced."""
    slowed: bool = False
    """The hardware holds its clocks down: heat, or power."""


def read_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs of this node; none where nvidia-smi is not there or does not answer."""
    if shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return parse_gpus(done.stdout) if done.returncode == 0 else ()


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """Return the GPUs of nvidia-smi's CSV; what a GPU does not have (``[N/A]``) counts as sound."""
    found: list[Gpu] = []
    for line in text.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(_FIELDS) or not values[0].isdigit():
            continue
        index, name, driver, errors, pending, failure, slowed = values
        found.append(
            Gpu(
                index=int(index),
                name=name,
                driver=driver,
                uncorrected_errors=int(errors) if errors.isdigit() else 0,
                rows_to_remap="Yes" in (pending, failure) or (failure.isdigit() and int(failure) > 0),
                slowed=slowed == "Active",
            )
        )
    return tuple(found)
