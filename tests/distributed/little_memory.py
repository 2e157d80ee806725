"""`install()` puts a rank and what it forks into a control group of its own with little memory, as SLURM does."""

from __future__ import annotations

import os
from pathlib import Path

BYTES = 400 * 2**20
"""More than a rank of the tests takes beside what it shares with the process it was forked from."""
MOUNT = Path("/sys/fs/cgroup")


def parent() -> tuple[Path, str] | None:
    """Return where control groups of memory can be made and the name of the limit; None where they can't."""
    for folder, limit in ((MOUNT / "memory", "memory.limit_in_bytes"), (MOUNT, "memory.max")):
        trial = folder / f"trainer-trial-{os.getpid()}"
        try:
            trial.mkdir()
        except OSError:
            continue
        found = (trial / limit).exists()
        trial.rmdir()
        if found:
            return folder, limit
    return None


def install() -> None:
    place = parent()
    assert place is not None
    group = place[0] / f"trainer-test-{os.environ['GROUP']}-{os.environ['RANK']}"
    group.mkdir()
    (group / place[1]).write_text(str(BYTES))
    (group / "cgroup.procs").write_text(str(os.getpid()))
