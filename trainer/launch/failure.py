"""Write RUN/failure.json from the ranks' reports, tell the user once, and complete status.json."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.core.environ import RankEnvironment
from trainer.core.failure_file import reports_directory, write_failure
from trainer.core.hostlist import expand_hostlist, expand_tasks_per_node, fills_hosts
from trainer.core.private import file_mode
from trainer.core.status_file import read_status, write_status
from trainer.resilience.failure_summary import Failure, summarise
from trainer.resilience.rank_report import RankReport, read_reports

VERSION = 1


def hosts_of_ranks(ranks: RankEnvironment, environment: Mapping[str, str]) -> dict[int, str]:
    """Return the host of each rank as SLURM says it; empty under other launchers and in other orders."""
    if ranks.launcher != "slurm" or not fills_hosts(environment.get("SLURM_DISTRIBUTION")):
        return {}
    try:
        hosts = expand_hostlist(environment.get("SLURM_STEP_NODELIST", ""))
        counts = expand_tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    except ValueError:
        return {}
    placed = [host for host, count in zip(hosts, counts, strict=False) for _ in range(count)]
    return dict(enumerate(placed)) if len(placed) == ranks.world_size else {}


def summarise_launch(
    run_directory: Path, launch: str, hosts: Mapping[int, str] | None = None, since_ns: int = 0
) -> dict[str, Any] | None:
    """Judge the reports of a launch, write RUN/failure.json and return its fields; None where no rank failed.

    ``hosts`` names the host of each rank, as far as known. Reports before ``since_ns`` are passed over. May be called
    again when more reports are there.
    """
    reports = read_reports(reports_directory(run_directory, launch), launch, since_ns)
    failure = summarise(reports, hosts)
    if failure is None:
        return None
    fields = to_json(failure, launch, reports)
    write_failure(run_directory, fields)
    return fields


def newest_launch(run_directory: Path, since_unix: float) -> str | None:
    """Return the launch that has written reports last, None if none has since then."""
    found: list[tuple[float, str]] = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(run_directory / "failures"):
            if entry.is_dir(follow_symlinks=False):
                found.append((entry.stat(follow_symlinks=False).st_mtime, entry.name))
    newest = max(found, default=None)
    return newest[1] if newest is not None and newest[0] >= since_unix else None


def to_json(failure: Failure, launch: str, reports: list[RankReport]) -> dict[str, Any]:
    """Return the fields of failure.json."""
    return {
        "version": VERSION,
        "time_unix": time.time(),
        "launch": launch,
        "class": failure.failure_class,
        "retryable": failure.retryable,
        "rank": failure.rank,
        "host": failure.host,
        "phase": failure.phase,
        "step": failure.step,
        "cause": failure.cause,
        "fix": failure.fix,
        "suspect_hosts": list(failure.suspect_hosts),
        "same_words": list(failure.same_words),
        "ranks": [
            {
                "rank": report.rank, "host": report.host, "event": report.event, "phase": report.phase,
                "step": report.step, "micro_batch": report.micro_batch, "stalled_seconds": report.stalled_seconds,
                "collective": report.collective_name if report.in_collective else None,
            }
            for report in reports
        ],
    }  # fmt: skip


def tell(run_directory: Path, fields: Mapping[str, Any], *, told: bool) -> None:
    """Say cause and fix on stderr. ``told``: the rank itself has. Touches no file system."""
    directory = reports_directory(run_directory, str(fields["launch"]))
    lines = [f"trainer: what each rank did: {directory}"]
    if not (told and fields["class"] == "exception"):  # then the message that is there already says what to do
        lines.insert(0, f"trainer: {fields['class']}: {fields['fix']}")
    if not told:
        lines.insert(0, f"trainer: {fields['cause']}")
    with contextlib.suppress(OSError, ValueError):
        print("\n".join(lines), file=sys.stderr, flush=True)


def is_first(directory: Path, name: str) -> bool:
    """Return whether no other process of the launch has asked the same; True where nothing can be written."""
    try:
        os.close(os.open(directory / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, file_mode()))
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


def note_in_status(run_directory: Path, exit_code: int, reason: str, *, began: bool, replaces_reason: bool) -> None:
    """Say in status.json how the run ended, where rank 0 has not or has repeated an echo's words.

    ``began``: whether the status is of this start at all; it is that of the start before until training begins, and
    what is said then is the end of none that has a number: the one before ended earlier, perhaps before a wait.
    """
    fields = read_status(run_directory) or {}
    if not began:
        fields.pop("attempt", None)
    state = fields.get("state")
    silent = state == "running" or not began
    if silent or (state == "failed" and replaces_reason):
        code = exit_code if silent else fields.get("exit_code", exit_code)
        write_status(run_directory, {**fields, "state": "failed", "exit_code": code, "reason": reason})
