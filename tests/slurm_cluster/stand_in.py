"""A rank that trains nothing: `stand_in.py RUN_DIR MODE`. It joins as `trainer train` would and ends as it would.

MODE stop: exit 75 at once in the first attempt, finish in the next. MODE wait: the same, but only when told to stop.
MODE stop-twice: stop in the first two attempts. MODE stale: exit 75 without a word. Each rank notes in RUN_DIR what it
saw.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

from trainer.core.environ import detect
from trainer.resilience.signals import StopFlag


def main() -> int:
    flag = StopFlag()
    flag.install()
    run_directory, mode = Path(sys.argv[1]), sys.argv[2]
    ranks = detect(os.environ)
    assert ranks is not None
    attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    note = run_directory / f"attempt-{attempt}-rank-{ranks.rank}.json"
    note.write_text(json.dumps(dataclasses.asdict(ranks)))
    if mode == "stale":
        return 75
    if attempt > (1 if mode == "stop-twice" else 0):
        _write_status(run_directory, ranks.rank, "finished", 0, None)
        return 0
    deadline = time.monotonic() + 60
    while mode == "wait" and flag.received is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # a save takes a while
    note.write_text(json.dumps({**dataclasses.asdict(ranks), "received": flag.received}))
    _write_status(run_directory, ranks.rank, "stopped", 75, flag.received)
    return 75


def _write_status(run_directory: Path, rank: int, state: str, exit_code: int, reason: str | None) -> None:
    if rank == 0:
        content = {"state": state, "exit_code": exit_code, "reason": reason, "updated_unix": time.time()}
        (run_directory / "status.json").write_text(json.dumps(content))


if __name__ == "__main__":
    sys.exit(main())
