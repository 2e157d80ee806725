"""RUN/status.json: the authority on how a run stands and ended, since launchers change exit codes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from pathlib import Path
from typing import Any, cast

from trainer.core.durable import replace_text


def status_path(run_directory: Path) -> Path:
    """Return RUN/status.json."""
    return run_directory / "status.json"


def write_status(run_directory: Path, fields: dict[str, Any]) -> None:
    """Replace status.json atomically. A full disk must not end a run, so OSError is passed over.

    Where there is no room for a second file the blocks of the first are written over: how a run ended must not be lost.
    """
    content = {**fields, "updated_unix": time.time()}
    path = status_path(run_directory)
    try:
        replace_text(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            with contextlib.suppress(OSError):
                _write_over(path, json.dumps(content).encode())


def _write_over(path: Path, text: bytes) -> None:
    """Write ``text``, JSON, over a file in place; one that has no room for it stays as it is. Raises OSError.

    What is left of the old content becomes spaces, which JSON allows at the end.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        before = os.pread(descriptor, size, 0)
        more = len(text) + 1 - size
        # The last block may have room left. Spaces first: half of them do no harm.
        if more > 0 and os.pwrite(descriptor, b" " * more, size) != more:
            return
        whole = text.ljust(max(size - 1, len(text))) + b"\n"
        try:
            written = os.pwrite(descriptor, whole, 0)
        except OSError:
            written = 0
        if written != len(whole):
            os.pwrite(descriptor, before, 0)
            return
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_status(run_directory: Path) -> dict[str, Any] | None:
    """Return the fields of status.json, None where it is missing or not a JSON object."""
    try:
        content: object = json.loads(status_path(run_directory).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", content) if isinstance(content, dict) else None
