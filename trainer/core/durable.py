"""Files that are whole or not there, also after a kill or a power cut."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

_TEMPORARY_NAME = re.compile(r"\..+\.tmp-[0-9]+")


def fsync_directory(directory: Path) -> None:
    """Make renames inside ``directory`` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Write and fsync. Raises OSError."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def delete_leftovers(directory: Path) -> None:
    """Delete what `replace_text` leaves in ``directory`` when it is killed; to be called by its only writer."""
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            if _TEMPORARY_NAME.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                path.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Replace a small file atomically: a reader sees the old or the new text."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        write_durably(temporary, text)
        temporary.replace(path)
        fsync_directory(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
