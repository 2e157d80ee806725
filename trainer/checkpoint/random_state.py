"""Every generator a rank draws from, as tensors, so that dropout goes on where it stopped."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy
import torch

PREFIX = "rng::"


def capture() -> dict[str, torch.Tensor]:
    """Return the states of Python's, NumPy's, torch's and CUDA's generators of this rank."""
    version, internal, gauss = random.getstate()
    legacy: Any = numpy.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = legacy
    assert (version, name) == (3, "MT19937")
    states = {
        "python": torch.tensor([*internal], dtype=torch.int64),
        # NaN: none is kept. The size is always the same, so that buffers for it can be made beforehand.
        "python_gauss": torch.tensor([math.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {PREFIX + key: value for key, value in states.items()}


def restore(states: dict[str, torch.Tensor]) -> None:
    """Set every generator to what `capture` returned; a state of a device that is absent here is passed over."""
    get = {key.removeprefix(PREFIX): value for key, value in states.items()}
    gauss = next((value for value in get["python_gauss"].tolist() if not math.isnan(value)), None)
    random.setstate((3, tuple(get["python"].tolist()), gauss))
    *keys, position, has_gauss = get["numpy"].tolist()
    numpy.random.set_state(
        ("MT19937", numpy.array(keys, dtype=numpy.uint32), position, has_gauss, get["numpy_gauss"].item())
    )
    torch.set_rng_state(get["torch"])
    if "cuda" in get and torch.cuda.is_available():
        torch.cuda.set_rng_state(get["cuda"])


def seed_everything(seed: int, rank: int, step: int = 0) -> None:
    """Seed all generators of a rank: a start, or a resume at another number of ranks."""
    mixed = int.from_bytes(f"{seed}/{rank}/{step}".encode().ljust(8, b"\0"), "little") % (2**63 - 1)
    random.seed(mixed)
    numpy.random.seed(mixed % 2**32)
    torch.manual_seed(mixed)
