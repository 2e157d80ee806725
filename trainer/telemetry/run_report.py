"""What became of a run: printed when it finishes, kept in RUN/report.json, shown by `trainer report`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.core.durable import replace_text
from trainer.core.json_values import number, text, whole
from trainer.core.status_file import read_status
from trainer.core.units import format_count, format_duration
from trainer.telemetry.attempt_files import newest_lines, read_attempts
from trainer.telemetry.attempt_times import AttemptTimes
from trainer.telemetry.expected_goodput import Costs, best_interval, daly_interval, expected_goodput, young_interval
from trainer.telemetry.goodput import AttemptParts, Goodput, divide, goodput, split_text

VERSION = 1
_SHOWN_ATTEMPTS = 12


@dataclass(frozen=True, kw_only=True)
class MeasuredCosts:
    """Means over a run, in seconds; None where nothing was measured."""

    step_seconds: float | None
    save_blocked_seconds: float | None
    save_durable_seconds: float | None
    restore_seconds: float | None
    startup_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What became of a run; None where it is not known."""

    run_directory: str
    state: str | None
    reason: str | None
    step: int | None
    total_steps: int | None
    tokens: int | None
    loss: float | None
    best_validation_loss: float | None
    best_step: int | None
    last_checkpoint_step: int | None
    wall_seconds: float | None
    """From the first allocation to the end, waits included."""
    goodput: Goodput | None
    costs: MeasuredCosts
    attempts: list[dict[str, Any]]
    """Of each start: outcome and reason, steps, and its part of the time."""

    def to_json(self) -> str:
        """Return one JSON object."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=2)


def collect_report(run_directory: Path) -> RunReport:
    """Return what the files of a run say. Copes with any that are missing or damaged."""
    status = read_status(run_directory) or {}
    attempts = read_attempts(run_directory)
    steps = [line for line in newest_lines(run_directory / "metrics.jsonl") if _is_step(line)]
    newest = steps[-1] if steps else {}
    parts = divide(attempts)
    return RunReport(
        run_directory=str(run_directory),
        state=text(status.get("state")),
        reason=text(status.get("reason")),
        # status.json may be some seconds older than the end of a run that was killed.
        step=max(
            (step for step in (whole(status.get("step")), whole(newest.get("step"))) if step is not None),
            default=None,
        ),
        total_steps=whole(status.get("total_steps")),
        tokens=whole(newest.get("tokens")),
        loss=number(newest.get("loss")),
        best_validation_loss=number(status.get("best_validation_loss")),
        best_step=whole(status.get("best_step")),
        last_checkpoint_step=whole(status.get("last_checkpoint_step")),
        wall_seconds=sum(part.allocated_seconds + part.waiting_seconds for part in parts) if parts else None,
        goodput=goodput(attempts),
        costs=measured_costs(attempts),
        attempts=[_attempt_fields(times, part) for times, part in zip(attempts, parts, strict=True)],
    )


def write_report(run_directory: Path, report: RunReport) -> None:
    """Replace RUN/report.json. Raises OSError."""
    replace_text(run_directory / "report.json", report.to_json() + "\n")


def measured_costs(attempts: Sequence[AttemptTimes]) -> MeasuredCosts:
    """Return what steps, saves, restores and starts took on average."""
    parts = divide(attempts)
    steps = sum(times.last_step - times.base_step for times in attempts)
    saves = sum(times.saves for times in attempts)
    restored = [times.restore_seconds for times in attempts if times.restore_seconds > 0]
    startups = [
        part.startup_seconds for times, part in zip(attempts, parts, strict=True) if times.first_step_unix is not None
    ]
    return MeasuredCosts(
        step_seconds=_mean(sum(times.step_seconds for times in attempts), steps),
        save_blocked_seconds=_mean(sum(times.save_seconds for times in attempts), saves),
        save_durable_seconds=_mean(sum(times.durable_seconds for times in attempts), saves),
        restore_seconds=_mean(sum(restored), len(restored)),
        startup_seconds=_mean(sum(startups), len(startups)),
    )


def describe_report(report: RunReport) -> list[str]:
    """Return lines for a person: two for a run of one undisturbed start, else a block."""
    found = report.goodput
    tokens = f"{format_count(report.tokens)} tokens" if report.tokens is not None else "no tokens"
    best = f"{report.best_validation_loss:.4f} at step {report.best_step}" if report.best_step is not None else None
    if found is None:
        return [f"{tokens}; nothing is known of its times"]
    if len(report.attempts) == 1 and found.restarts == 0 and found.lost_steps == 0 and report.state == "finished":
        first = f"{tokens} in {format_duration(found.allocated_seconds)}, goodput {split_text(found.fractions)}"
        checkpoint = f"last checkpoint: step {report.last_checkpoint_step}"
        return [first, f"best validation loss: {best}, {checkpoint}" if best else checkpoint]
    total = f" of {report.total_steps}" if report.total_steps else ""
    waits = f", and {format_duration(found.waiting_seconds)} between them" if found.waiting_seconds >= 0.5 else ""
    spent = f"{format_duration(found.allocated_seconds)} in {len(report.attempts)} starts ({_hours(found)})"
    checkpoint = str(report.last_checkpoint_step) if report.last_checkpoint_step is not None else None
    rows: list[tuple[str, str | None]] = [
        ("state", f"{report.state}: {_one_line(report.reason)}" if report.reason else report.state),
        ("steps", f"{report.step}{total}, {tokens}"),
        ("time", spent + waits),
        ("goodput", split_text(found.fractions)),
        ("restarts", f"{found.restarts}, {found.lost_steps} steps lost"),
        *(("", line) for line in _attempt_lines(report.attempts, alive=report.state == "running")),
        ("validation", f"best loss {best}" if best else None),
        ("checkpoint", f"step {checkpoint}" if checkpoint else None),
    ]
    return [f"{name:<11} {value}" for name, value in rows if value is not None]


def interval_lines(costs: MeasuredCosts, mtbf_hours: float, downtime_seconds: float | None = None) -> list[str]:
    """Return what `checkpoint.every_steps` should be if the job failed every ``mtbf_hours``, from measured costs.

    ``mtbf_hours`` is finite. ``downtime_seconds`` from a failure to the restore; None: the measured start-up.
    """
    if costs.step_seconds is None or costs.save_blocked_seconds is None:
        return ["no interval can be advised: the run has measured no step or no save"]
    assumed = Costs(
        mtbf_seconds=mtbf_hours * 3600,
        blocked_seconds=costs.save_blocked_seconds,
        durable_seconds=costs.save_durable_seconds or 0.0,
        restore_seconds=costs.restore_seconds or 0.0,
        downtime_seconds=(costs.startup_seconds or 0.0) if downtime_seconds is None else downtime_seconds,
    )
    best = best_interval(assumed, costs.step_seconds)
    steps = max(1, round(best / costs.step_seconds))
    expected = expected_goodput(steps * costs.step_seconds, assumed)
    return [
        f"at a failure every {mtbf_hours:g} h: checkpoint.every_steps={steps} ({format_duration(best)}), "
        f"expected goodput {expected:.1%} without evaluations",
        f"Young {format_duration(young_interval(assumed))}, Daly {format_duration(daly_interval(assumed))}; "
        f"a save stops training for {format_duration(assumed.blocked_seconds)} and is durable after "
        f"{format_duration(assumed.durable_seconds)}, {format_duration(assumed.restore_seconds)} to restore, "
        f"{format_duration(assumed.downtime_seconds)} to start",
    ]


def _attempt_fields(times: AttemptTimes, part: AttemptParts) -> dict[str, Any]:
    names = ("nodes", "slurm_job_id", "slurm_restarts", "resumed_step", "last_step", "outcome", "reason")
    return {**asdict(part), **{name: getattr(times, name) for name in names}}


def _attempt_lines(attempts: list[dict[str, Any]], *, alive: bool) -> list[str]:
    lines = [f"and {len(attempts) - _SHOWN_ATTEMPTS} earlier ones"] if len(attempts) > _SHOWN_ATTEMPTS else []
    for fields in attempts[-_SHOWN_ATTEMPTS:]:
        first, last = fields["resumed_step"], fields["last_step"]
        steps = "no step" if first is None or last <= first else f"steps {first + 1}-{last}"
        silent = "running, or killed" if alive and fields is attempts[-1] else "killed"
        how = fields["outcome"] or silent
        reason = f": {_one_line(fields['reason'])}" if fields["reason"] else ""
        lost = f", {fields['lost_steps']} lost" if fields["lost_steps"] else ""
        took = format_duration(fields["allocated_seconds"])
        lines.append(f"{fields['attempt']}: {steps}{lost}, {took}, {how}{reason}")
    return lines


def _one_line(text: str) -> str:
    """Return the first line of an error, without what would move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in text.partition("\n")[0][:200])


def _hours(found: Goodput) -> str:
    return f"{found.rank_hours:.3g} rank-hours"


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None


def _is_step(line: dict[str, Any]) -> bool:
    return line.get("kind") is None and whole(line.get("step")) is not None
