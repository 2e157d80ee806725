"""RUN/failure.json: why a launch failed, and RUN/failures/LAUNCH/: what each of its ranks was doing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from trainer.core.durable import replace_text
from trainer.core.environ import RankEnvironment


def failure_path(run_directory: Path) -> Path:
    """Return RUN/failure.json."""
    return run_directory / "failure.json"


def reports_directory(run_directory: Path, launch: str) -> Path:
    """Return RUN/failures/LAUNCH."""
    return run_directory / "failures" / launch


def launch_name(ranks: RankEnvironment, environment: Mapping[str, str]) -> str:
    """Return a name that all ranks of one launch share and no other launch has: a file name."""
    job = environment.get("SLURM_JOB_ID", "")
    if job and ranks.launcher == "slurm":
        parts = ["slurm", job, environment.get("SLURM_RESTART_COUNT", "") or "0", environment.get("SLURM_STEP_ID", "")]
    else:
        # torchrun starts ranks again under the same address.
        attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "")
        parts = [job, ranks.master_address, str(ranks.master_port), attempt]
    name = "-".join(filter(None, parts))
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    # Two names that differ in odd characters alone must stay different.
    return (
        safe if safe == name and len(name) <= 100 else f"{safe[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    )


def write_failure(run_directory: Path, fields: dict[str, Any]) -> None:
    """Replace failure.json atomically. OSError is passed over: what a full disk loses was said on stderr too."""
    with contextlib.suppress(OSError):
        replace_text(failure_path(run_directory), json.dumps(fields, indent=2) + "\n")


def read_failure(run_directory: Path, launch: str | None = None) -> dict[str, Any] | None:
    """Return the fields of failure.json; None where it is missing, damaged, or of another ``launch``."""
    try:
        content: object = json.loads(failure_path(run_directory).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    fields = cast("dict[str, Any]", content) if isinstance(content, dict) else None
    return fields if fields is not None and launch in (None, fields.get("launch")) else None
