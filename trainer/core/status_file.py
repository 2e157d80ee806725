"""RUN/status.json: the authority on how a run stands and ended, since launchers change exit codes."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any, cast

from trainer.core.durable import replace_text


def status_path(run_directory: Path) -> Path:
    """Return RUN/status.json."""
    return run_directory / "status.json"


def write_status(run_directory: Path, fields: dict[str, Any]) -> None:
    """Replace status.json atomically. A full disk must not end a run, so OSError is passed over."""
    text = json.dumps({**fields, "updated_unix": time.time()}, indent=2) + "\n"
    with contextlib.suppress(OSError):
        replace_text(status_path(run_directory), text)


def read_status(run_directory: Path) -> dict[str, Any] | None:
    """Return the fields of status.json, None where it is missing or not a JSON object."""
    try:
        content: object = json.loads(status_path(run_directory).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", content) if isinstance(content, dict) else None
