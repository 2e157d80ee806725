"""RUN/failures/LAUNCH as one of the supervisors of a launch sees it: an earlier launch may have had the same name."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from pathlib import Path

from trainer.core.failure_file import reports_directory
from trainer.core.private import directory_mode, file_mode
from trainer.resilience.rank_report import RankReport, read_reports, report_path, stacks_path, write_report

_STALE_SECONDS = 10.0
"""Ranks of one launch start within this time."""
_KEPT_LAUNCHES = 20
JUDGED, TOLD = "judged", "told"
"""Files that the first supervisor to do so leaves."""


class LaunchReports:
    """The reports of a launch. All methods may wait for the file system."""

    def __init__(self, run_directory: Path, launch: str, rank: int, *, unique: bool) -> None:
        """``unique``: no other launch has this name."""
        self.directory = reports_directory(run_directory, launch)
        self._run_directory, self._launch, self._rank, self._unique = run_directory, launch, rank, unique
        self._seen_ns = 0
        self.since_ns = 0
        """Files older than this (by the clock that dates files there) are of an earlier launch."""

    def begin(self) -> None:
        """Put away what is left of an earlier launch of the same name, and all but the newest launches."""
        if not self._unique and self.directory.exists():
            self.since_ns = self._now_ns()
            stale_ns = self.since_ns - int(_STALE_SECONDS * 1e9)
            if self._rank == 0 and self.directory.stat().st_mtime_ns < stale_ns:
                shutil.rmtree(self.directory, ignore_errors=True)
            for path in (report_path(self.directory, self._rank), stacks_path(self.directory, self._rank)):
                path.unlink(missing_ok=True)
            for name in (JUDGED, TOLD):  # else nobody would speak for this launch
                if not self._is_ours(self.directory / name):
                    (self.directory / name).unlink(missing_ok=True)
        if self._rank == 0 and self.directory.parent.exists():
            launches = [path for path in self.directory.parent.iterdir() if path.is_dir() and not path.is_symlink()]
            for path in sorted(launches, key=lambda path: path.stat().st_mtime)[:-_KEPT_LAUNCHES]:
                shutil.rmtree(path, ignore_errors=True)

    def write(self, report: RankReport, stacks: str) -> bool:
        """Write the report of this rank, and its stacks if there are any. Raises OSError.

        Return whether it was: not where the run directory is gone.
        """
        if not self._run_directory.is_dir():
            return False
        self.directory.parent.mkdir(mode=directory_mode(), exist_ok=True)
        self.directory.mkdir(mode=directory_mode(), exist_ok=True)
        if stacks:
            path, flags = stacks_path(self.directory, self._rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            with open(os.open(path, flags, file_mode()), "w", encoding="utf-8") as file:
                file.write(stacks)
        write_report(self.directory, report)
        return True

    def read(self) -> list[RankReport]:
        """Return those of this launch."""
        return read_reports(self.directory, self._launch, self.since_ns)

    def count(self) -> int:
        """Return how many ranks of this launch have left one."""
        with contextlib.suppress(OSError):
            names = [n for n in os.listdir(self.directory) if n.startswith("rank-") and n.endswith(".json")]
            return sum(self._is_ours(self.directory / name) for name in names) if self.since_ns else len(names)
        return 0

    def is_lowest(self) -> bool:
        """Return whether no rank before this one has left one: its supervisor would have judged."""
        return not any(self._is_ours(report_path(self.directory, rank)) for rank in range(self._rank))

    def are_told(self) -> bool:
        """Return whether a supervisor of this launch has said who is the cause."""
        return self._is_ours(self.directory / TOLD)

    def peer_failed(self) -> bool:
        """Return whether another supervisor of this launch has written since the last look."""
        try:
            changed = self.directory.stat().st_mtime_ns
        except OSError:
            changed = 0
        if changed == self._seen_ns:
            return False
        self._seen_ns = changed
        return self.count() > 0

    def _is_ours(self, path: Path) -> bool:
        try:
            return path.stat().st_mtime_ns >= self.since_ns
        except OSError:
            return False

    def _now_ns(self) -> int:
        """Return the time by the clock that dates files there: that of a server may be another than this host's."""
        path = self.directory.parent / f".clock-{socket.gethostname()}-{os.getpid()}"
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, file_mode())
            try:
                return os.fstat(descriptor).st_mtime_ns
            finally:
                os.close(descriptor)
                path.unlink()
        except OSError:
            return time.time_ns()
