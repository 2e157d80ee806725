"""Whether a run directory is another job's, as rank 0's supervisor sees it: rank 0 may die before it knows."""

from __future__ import annotations

import time
from pathlib import Path

from trainer.core.lock_owner import Owner, Place
from trainer.core.run_lock import lock_path


class LockWatch:
    """RUN/.lock since a launch began. Its methods may wait for the file system."""

    def __init__(self, run_directory: Path) -> None:
        self._path = lock_path(run_directory)
        self._at_start = b""
        self._began = time.monotonic()

    def begin(self) -> None:
        """Note what the file says now: a live owner on another host changes it every few seconds."""
        self._at_start = self._path.read_bytes()
        self._began = time.monotonic()

    def holder(self, own: int) -> tuple[int | None, float]:
        """Return the process that holds the directory, None: nobody; and in how many seconds to ask again, 0: it is so.

        ``own`` is the process of this launch's rank 0, whose record counts though it is dead.
        """
        content = self._path.read_bytes()
        owner, place = Owner.parse(content), Place.here()
        if owner is None:
            return None, 0.0
        if owner.pid == own:
            return own, 0.0
        if owner.sign_of_death(place) is not None:  # a start that was killed leaves its record
            return None, 0.0
        if owner.lives_at(place) or content != self._at_start:
            return owner.pid, 0.0
        seconds = self._began + owner.watch_seconds - time.monotonic()
        return (owner.pid, seconds) if seconds > 0 else (None, 0.0)
