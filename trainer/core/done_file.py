"""RUN/DONE: rank 0 has written it when the run was finished, before anything could go wrong while leaving."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from trainer.core.durable import replace_text

_MAXIMUM_BYTES = 65_536


@dataclass(frozen=True)
class Done:
    """How a run ended that has nothing left to do."""

    step: int
    """Steps done; a checkpoint of it was committed."""
    attempt: int
    reason: str | None
    """Why it ended before its last step (early stopping), None: it did not."""
    time_unix: float
    version: int = 1


def done_path(run_directory: Path) -> Path:
    """Return RUN/DONE."""
    return run_directory / "DONE"


def write_done(run_directory: Path, *, step: int, attempt: int, reason: str | None) -> None:
    """Write RUN/DONE. A full disk must not fail a finished run, so OSError is passed over: its checkpoint tells too."""
    with contextlib.suppress(OSError):
        replace_text(done_path(run_directory), json.dumps(asdict(Done(step, attempt, reason, time.time()))) + "\n")


def read_done(run_directory: Path) -> Done | None:
    """Return what RUN/DONE says, None where it is missing or makes no sense."""
    try:
        with done_path(run_directory).open("rb") as file:
            content: object = json.loads(file.read(_MAXIMUM_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    given = cast("dict[str, Any]", content)
    step, attempt, reason, at = (given.get(name) for name in ("step", "attempt", "reason", "time_unix"))
    if type(step) is not int or type(attempt) is not int or not isinstance(at, int | float):
        return None
    return Done(step, attempt, reason if isinstance(reason, str) else None, at)


def remove_done(run_directory: Path) -> None:
    """Delete RUN/DONE: the run goes on. OSError is passed over: a start compares it with the steps asked for."""
    with contextlib.suppress(OSError):
        done_path(run_directory).unlink(missing_ok=True)
