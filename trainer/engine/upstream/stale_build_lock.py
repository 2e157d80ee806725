"""Survive a compilation of DeepSpeed's operations that was killed (torch 2.13).

torch keeps others out of a build by a file's existence: a builder that is killed leaves it, and every later start waits
for ever (https://github.com/pytorch/pytorch/issues/189245). A lock of the system goes with its process.
Test: tests/distributed/test_nvme.py.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from torch.utils import cpp_extension


@contextlib.contextmanager
def building(name: str) -> Iterator[None]:
    """Be alone in building or loading operation ``name`` among our processes here; clear away a dead one's file."""
    directory = Path(cpp_extension._get_build_directory(name, verbose=False))
    with (directory / "trainer.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (directory / "lock").unlink(missing_ok=True)
        yield
