"""What a lock file says of its owner, and whether that owner is alive as far as this host can know."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import socket
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import cast

from trainer.core.environ import slurm_job

RECORD_BYTES = 1024
"""A record is padded to this size: a refresh overwrites it in place, with one write."""
_INTERVAL_LIMITS_SECONDS = (0.02, 60.0)
_TEXT = re.compile(r"[\x21-\x7e]{0,120}")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process runs: two places with equal boot ids and namespaces see each other's processes."""

    host: str
    boot_id: str
    """Changes when the machine starts; empty where the system has none."""
    pid_namespace: str
    slurm_cluster: str = ""
    slurm_job: str = ""
    slurm_restarts: int = 0

    @classmethod
    def here(cls) -> Place:
        """Return where this process runs."""
        cluster, job, restarts = slurm_job(os.environ) or ("", "", 0)
        return cls(
            host=_printable(socket.gethostname()),
            boot_id=_text_of(Path("/proc/sys/kernel/random/boot_id")),
            pid_namespace=_target_of(Path("/proc/self/ns/pid")),
            slurm_cluster=_printable(cluster),
            slurm_job=_printable(job),
            slurm_restarts=restarts,
        )


@dataclass(frozen=True, kw_only=True)
class Owner(Place):
    """The content of a lock file: one JSON object. Times are of the owner's clock: to be shown, not compared."""

    token: str
    """Drawn anew by every start."""
    pid: int
    pid_started_ticks: int
    """When the process started, in clock ticks since its machine did; 0: unknown. Tells it from a later one."""
    since_unix: float
    interval_seconds: float
    """Time between two heartbeats."""
    heartbeat: int = 0
    """Raised by every refresh: a watcher looks for a change, whatever its clock says."""
    time_unix: float = 0.0
    """When the record was last refreshed."""

    @classmethod
    def new(cls, place: Place, interval_seconds: float) -> Owner:
        """Return the record of this process."""
        pid, now = os.getpid(), time.time()
        return cls(
            **asdict(place), token=secrets.token_hex(16), pid=pid, pid_started_ticks=_started_ticks(pid) or 0,
            since_unix=now, interval_seconds=interval_seconds, time_unix=now,
        )  # fmt: skip

    @classmethod
    def parse(cls, content: bytes) -> Owner | None:
        """Return the owner that ``content`` names, None if it names none. Nothing in it is trusted."""
        try:
            values: object = json.loads(content)
        except (ValueError, RecursionError):
            return None
        if not isinstance(values, dict):
            return None
        given = cast("dict[str, object]", values)
        kept: dict[str, object] = {}
        for field in fields(cls):
            value = given.get(field.name)
            if field.type == "str":
                sound = isinstance(value, str) and _TEXT.fullmatch(value)
            else:
                numbers = (int, float) if field.type == "float" else (int,)
                sound = type(value) in numbers and 0 <= cast("float", value) < 1e11
            if not sound:
                return None
            kept[field.name] = value
        owner = cls(**kept)  # pyright: ignore[reportArgumentType] - checked field by field above
        low, high = _INTERVAL_LIMITS_SECONDS
        return replace(owner, interval_seconds=min(high, max(low, owner.interval_seconds)))

    def record(self) -> bytes:
        """Return what is written: JSON, padded to RECORD_BYTES."""
        return json.dumps(asdict(self)).encode().ljust(RECORD_BYTES - 1) + b"\n"

    def refreshed(self) -> Owner:
        """Return the record of the next heartbeat."""
        return replace(self, heartbeat=self.heartbeat + 1, time_unix=time.time())

    @property
    def watch_seconds(self) -> float:
        """How long its record may stay the same before it counts as dead: a bit more than two intervals."""
        return 2.4 * self.interval_seconds

    def named(self) -> str:
        """Return "pid 17 on node3"."""
        return f"pid {self.pid} on {self.host}"

    def __str__(self) -> str:
        job = f", SLURM job {self.slurm_job}" if self.slurm_job else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since_unix))
        return f"{self.named()}{job}, since {since}"

    def sign_of_death(self, place: Place) -> str | None:
        """Return why the owner can't live any more, as seen from ``place``; None if that can't be known at once."""
        same_job = (self.slurm_cluster, self.slurm_job) == (place.slurm_cluster, place.slurm_job)
        if self.slurm_job and same_job and place.slurm_restarts > self.slurm_restarts:
            return f"SLURM job {self.slurm_job} was requeued since"
        # Machines without a name of their own are all called localhost.
        if self.host != place.host or self.host.startswith("localhost") or not (self.boot_id and place.boot_id):
            return None
        # Another boot id is no sign: machines made from one image may share a name.
        here = (self.boot_id, self.pid_namespace) == (place.boot_id, place.pid_namespace)
        if here and not _lives(self.pid, self.pid_started_ticks):
            return "the process is gone"
        return None

    def lives_at(self, place: Place) -> bool:
        """Return whether ``place`` sees the owner's process alive."""
        seen = (self.host, self.boot_id, self.pid_namespace) == (place.host, place.boot_id, place.pid_namespace)
        return seen and bool(self.boot_id) and _lives(self.pid, self.pid_started_ticks)


def _lives(pid: int, started_ticks: int) -> bool:
    found = _started_ticks(pid)
    return found is not None and (started_ticks in (0, found))


def _started_ticks(pid: int) -> int | None:
    """Return when a process started, None if there is none that still runs (zombies don't)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # proc(5): the name in parentheses may hold anything; the state follows, and the start is 19 fields after it.
    values = text.rpartition(")")[2].split()
    return None if len(values) < 20 or values[0] in ("Z", "X") else int(values[19])


def _printable(text: str) -> str:
    return re.sub(r"[^\x21-\x7e]", "?", text)[:120]


def _text_of(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _target_of(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def seconds_text(seconds: float) -> str:
    """Return "12 s" or "0.5 s"."""
    return f"{math.ceil(seconds)} s" if seconds >= 1 else f"{seconds:.1g} s"
