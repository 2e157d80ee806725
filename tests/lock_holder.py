"""A process that takes a run directory's lock: lock_holder.py RUN_DIRECTORY OPTIONS.

Answers "taken", or "refused: ..." and ends; then a line for each line of stdin: "mine" (True or False), "release".
OPTIONS is a JSON object: ``place`` (fields of Place that differ from the real ones), ``flock`` (false: a file system
without locks), ``interval_seconds``. What the lock says is printed too, with "says: " before it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from trainer.core.errors import RefusedError
from trainer.core.lock_owner import Place
from trainer.core.run_lock import RunLock


def no_flock(descriptor: int, operation: int) -> None:
    """What a file system without locks answers; there is none here."""
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


def main() -> None:
    run, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    try:
        lock = RunLock(
            run,
            say=lambda text: print(f"says: {text}", flush=True),
            place=replace(Place.here(), **options.get("place", {})),
            flock=fcntl.flock if options.get("flock", True) else no_flock,
            interval_seconds=options.get("interval_seconds", 0.5),
        )
    except RefusedError as error:
        print("refused:", " ".join(str(error).splitlines()), flush=True)
        return
    print("taken", flush=True)
    for line in sys.stdin:
        if line.strip() == "mine":
            print(lock.still_mine(), flush=True)
        else:
            lock.release()
            print("released", flush=True)


if __name__ == "__main__":
    main()
