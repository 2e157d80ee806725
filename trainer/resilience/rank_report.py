"""What a rank's supervisor writes down about it: RUN/failures/LAUNCH/rank-00003.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

from trainer.core.durable import replace_text

Event = Literal["died", "exited", "raised", "stalled", "snapshot"]
"""Killed by a signal; ended by itself without an exception; by one; no progress; or only asked because of another."""
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """One rank at the moment of a failure."""

    rank: int
    world_size: int
    node_rank: int
    host: str
    launch: str
    event: Event
    time_unix: float
    phase: str
    step: int
    micro_batch: int = -1
    """Counted from 0; -1: none."""
    detail: str = ""
    reading: str = ""
    """File that was being read."""
    collective_name: str = ""
    """The last one that was entered; empty: none yet."""
    collective_group: str = ""
    collective_number: int = 0
    """Counted from 1 in its group."""
    collective_elements: int = 0
    in_collective: bool = False
    stalled_seconds: float = 0.0
    """Since the last sign of progress."""
    process_state: str = ""
    """As /proc says it: R running, S sleeping, D waiting for a disk, T stopped."""
    lock_held: bool = False
    """No Python code has run for a while though the process was not stopped: C code keeps the interpreter's lock."""
    exit_code: int | None = None
    signal: str = ""
    out_of_memory: bool = False
    """The system has killed processes for want of memory since the rank began."""
    exception_type: str = ""
    exception_message: str = ""
    exception_unix: float = 0.0
    blamed_ranks: tuple[str, ...] = ()
    """Ranks that the exception says are at fault; empty: the one that raised it."""
    blamed_hosts: tuple[str, ...] = ()
    """Hosts that it says are not to be trusted."""
    log_tail: str = ""
    address: str = ""
    """host:port that this node's first supervisor answers at."""
    unreachable: tuple[str, ...] = ()
    """Hosts that this one could not connect to."""


def report_path(directory: Path, rank: int) -> Path:
    """Return DIRECTORY/rank-00003.json."""
    return directory / f"rank-{rank:05d}.json"


def stacks_path(directory: Path, rank: int) -> Path:
    """Return DIRECTORY/rank-00003.stacks.txt: the Python stacks of the rank's threads."""
    return directory / f"rank-{rank:05d}.stacks.txt"


def write_report(directory: Path, report: RankReport) -> None:
    """Write it so that a reader sees all or nothing. Raises OSError."""
    content = {"version": VERSION} | asdict(report)
    replace_text(report_path(directory, report.rank), json.dumps(content, indent=1) + "\n")


def read_reports(directory: Path, launch: str, since_ns: int = 0) -> list[RankReport]:
    """Return the sound reports of ``launch`` in rank order; what can't be read, or is older, is passed over."""
    found: dict[int, RankReport] = {}
    for path in sorted(directory.glob("rank-*.json")):
        try:
            if since_ns and path.stat().st_mtime_ns < since_ns:
                continue
            report = _parse(json.loads(path.read_bytes()))
        except (OSError, ValueError, RecursionError):
            continue
        if report is not None and report.launch == launch:
            found[report.rank] = report
    return [found[rank] for rank in sorted(found)]


_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (int, float), "str": (str,), "bool": (bool,), "int | None": (int, type(None)),
    "Event": (str,), "tuple[str, ...]": (list, tuple),
}  # fmt: skip


def _parse(content: object) -> RankReport | None:
    """Return the report, None for anything else: the file may be damaged, or of another version."""
    if not isinstance(content, Mapping):
        return None
    given = cast("Mapping[str, Any]", content)
    values: dict[str, Any] = {}
    for field in fields(RankReport):
        if field.name not in given:
            continue
        value = given[field.name]
        if not isinstance(value, _TYPES[str(field.type)]):
            return None
        values[field.name] = (
            tuple(str(item) for item in cast("list[object]", value)) if isinstance(value, list) else value
        )
    if given.get("version") != VERSION or values.get("event") not in get_args(Event):
        return None
    try:
        return RankReport(**values)
    except TypeError:  # a field without a default is missing
        return None
