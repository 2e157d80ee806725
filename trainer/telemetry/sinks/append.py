"""Append whole records to a file, or none of their bytes; replace a file by an edited copy of itself."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path


class AppendFile:
    """A file that only ever holds whole records, also when the disk fills up in the middle of one.

    Every append is one write to the kernel, so a SIGKILL loses nothing that was appended.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._size_bytes = os.fstat(self._descriptor).st_size
        self._torn = False

    def append(self, record: bytes) -> None:
        """Write all of ``record``. Raises OSError after taking back what was written of it."""
        self._mend()
        view = memoryview(record)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError:
            self._torn = len(view) < len(record)
            self._mend()
            raise
        self._size_bytes += len(record)

    def _mend(self) -> None:
        if self._torn:
            os.ftruncate(self._descriptor, self._size_bytes)
            self._torn = False

    def close(self) -> None:
        """Close the file. May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def replace_file(path: Path, records: Iterable[bytes]) -> None:
    """Make ``records``, joined, the content of ``path`` in one step: readers see the old file or the new one.

    ``records`` may be read from ``path`` meanwhile. A file that would not change is left alone. Raises OSError.
    """
    # The name must not look like an event file ("tfevents"), or TensorBoard would read it.
    temporary = path.with_name(f".{path.name.replace('tfevents', 'events')}.rewrite")
    try:
        with temporary.open("wb") as file:
            for record in records:
                file.write(record)
            file.flush()
            os.fsync(file.fileno())
        # Records are only ever left out or completed by a newline, so an equal size means equal content.
        if temporary.stat().st_size == path.stat().st_size:
            return
        shutil.copymode(path, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
