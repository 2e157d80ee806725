"""The far end of `trainer.launch.ssh`: start this host's ranks as the first line of stdin says, then obey the others.

Each further line is the name of a signal for the ranks. At the end of stdin the launcher or the connection is gone: the
agent dies, and its ranks with it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import IO, Any

from trainer.core.environ import RankEnvironment
from trainer.launch.local import FORWARDED, run_local

_SIGNALS = {signum.name: signum for signum in FORWARDED}


def main() -> int:
    """Run the ranks and return their exit code."""
    stdin = os.fdopen(0, "rb", buffering=0)
    task: dict[str, Any] = json.loads(stdin.readline())
    os.chdir(task["directory"])

    def place(local_rank: int) -> RankEnvironment:
        return RankEnvironment(
            task["first_rank"] + local_rank, task["world_size"], local_rank, task["ranks"], task["node_rank"],
            task["address"], task["port"], "ssh",
        )  # fmt: skip

    threading.Thread(target=_obey, args=[stdin], daemon=True).start()
    environment = {**os.environ, **task["environment"]}
    return run_local(task["command"], task["ranks"], environment=environment, place=place)


def _obey(stdin: IO[bytes]) -> None:
    while line := stdin.readline():
        signum = _SIGNALS.get(line.decode(errors="replace").strip())
        if signum is not None:
            os.kill(os.getpid(), signum)  # run_local passes it on
    # Ranks ask the kernel to die with this process; see trainer.core.environ.die_with_parent.
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
