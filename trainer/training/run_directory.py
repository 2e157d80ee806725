"""The run directory: the facts of every start, the status, and the lock that keeps a second job out."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from trainer.config.run import Recipe
from trainer.config.yaml_text import dump_yaml
from trainer.core.durable import delete_leftovers, replace_text
from trainer.core.errors import CheckpointError
from trainer.core.private import directory_mode, make_run_directory
from trainer.core.redact import redacted, redacted_text, redacted_words
from trainer.core.run_lock import RunLock, holder
from trainer.core.status_file import read_status, write_status
from trainer.telemetry.run_report import collect_report, describe_report, write_report
from trainer.training.attempt_clock import AttemptClock

_LOGGED_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "TRAINER_LAUNCHER",
)  # fmt: skip
_LOGGED_VARIABLES += ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT", "NCCL_SOCKET_IFNAME")
"""An allow-list: the environment also holds tokens and keys."""
_PACKAGES = ("trainer", "torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy", "pydantic")


class RunDirectory:
    """Rank 0's hand on RUN/: claims it, writes down what runs, keeps status.json."""

    def __init__(
        self,
        recipe: Recipe,
        deepspeed_json: dict[str, Any],
        world_size: int,
        launch: str,
        say: Callable[[str], None] = print,
    ) -> None:
        """Claim the directory, changing nothing in it. Raises RefusedError if another process is training in it.

        ``launch`` is the name of the launch. ``say`` is told what became of a dead owner's lock.
        """
        self.path = Path(recipe.run.directory)
        make_run_directory(self.path, recipe.run.group_access)
        self._lock = RunLock(self.path, say=say)
        delete_leftovers(self.path)
        self.attempt = 1 + max((int(p.name) for p in self.path.glob("attempts/[0-9]*") if p.name.isdigit()), default=0)
        self.clock = AttemptClock(self.path, self.attempt, world_size, launch)
        self.before: dict[str, Any] = read_status(self.path) or {}
        """status.json as the start before left it."""
        self._status: dict[str, Any] = {"attempt": self.attempt, "restarts": self.attempt - 1}
        # What was asked for outlives a start.
        self._status |= {key: self.before[key] for key in ("control", "stop_step") if key in self.before}
        self._facts: dict[str, str] | None = {
            "run.yaml": dump_yaml(redacted(recipe.model_dump(mode="json"))),
            "deepspeed.json": json.dumps(redacted(deepspeed_json), indent=2, sort_keys=True) + "\n",
            "environment.json": json.dumps(_environment(world_size), indent=2, sort_keys=True) + "\n",
        }

    @property
    def started(self) -> bool:
        """Whether this start has said anything in status.json."""
        return self._facts is None

    def status(self, **changes: Any) -> None:
        """Change fields of status.json; the first call also writes down what this start runs.

        Not called by a start that is refused: the facts and status of the run it would have continued stay.
        A full disk must not end the run, so errors are passed over. Where another start has taken the directory, the
        status is that one's.
        """
        if not self._lock.still_mine():
            return
        with contextlib.suppress(OSError):
            self._write_facts()
        self._status |= changes
        if "exit_code" in changes:
            self.clock.end(changes["state"], changes.get("reason"))
        if (found := self.clock.goodput()) is not None:
            self._status["goodput"] = found.to_json()
        write_status(self.path, self._status)

    def _write_facts(self) -> None:
        """Write run.yaml, deepspeed.json and environment.json of this start, and as the newest at the top."""
        facts, self._facts = self._facts, None
        if facts is None:
            return
        attempt = self.path / "attempts" / f"{self.attempt:04d}"
        attempt.parent.mkdir(mode=directory_mode(), exist_ok=True)
        attempt.mkdir(mode=directory_mode())
        for name, text in facts.items():
            replace_text(attempt / name, text)
            replace_text(self.path / name, text)
        self.clock.start()

    def report(self, say: Callable[[str], None]) -> None:
        """Say what became of the finished run, and write it into report.json."""
        found = collect_report(self.path)
        for line in describe_report(found):
            say(line)
        with contextlib.suppress(OSError):  # a full disk must not end a run that has finished
            write_report(self.path, found)

    @property
    def lost(self) -> bool:
        """Whether another start has taken the directory: this one must end."""
        return self._lock.lost

    def refuse_if_taken_over(self) -> None:
        """Raise CheckpointError if another job trains here now: this one was thought dead."""
        if not self._lock.still_mine():
            owner = holder(self.path, watch=False) or "on another host"
            raise CheckpointError(f"another job has taken over {self.path} ({owner}): this one may not commit any more")

    def release(self) -> None:
        """Let the next job in."""
        self.clock.close()
        self._lock.release()


def _environment(world_size: int) -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "command": redacted_words(sys.argv),
        "world_size": world_size,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
        "variables": {name: redacted_text(os.environ[name]) for name in _LOGGED_VARIABLES if name in os.environ},
        "started_unix": time.time(),
    }
