"""`install()` makes a rank write the CPUs that its threads may use, when it ends, into cpus-RANK."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from trainer.training import rank


def install() -> None:
    end = rank.end_process

    def show(code: int) -> None:
        cpus: set[int] = set()
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # a thread that has just ended
                cpus |= os.sched_getaffinity(int(thread.name))
        Path(f"cpus-{os.environ['RANK']}").write_text(" ".join(map(str, sorted(cpus))))
        end(code)

    rank.end_process = show
