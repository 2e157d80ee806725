"""Simulate a month of a job whose nodes fail, and find out how often it should save.

usage: python tools/simulate_goodput.py [--gpus 1024] [--run RUN_DIR] [--detection-seconds S ...] [--csv FILE]

Failures come at the rate of Llama 3's training: 419 unexpected interruptions in 54 days on 16,384 GPUs, as a Poisson
process while the job runs. After each it is noticed, restarted, restores the newest durable checkpoint and does again
what was lost. A save stops training for a moment and is durable later; the next one waits for it. Events are simulated
one by one, many months for each interval, and set beside the closed form (trainer/telemetry/expected_goodput.py),
Young's and Daly's intervals. Every input is printed with where it comes from: measured (docs/benchmarks/, or the times
of a run with --run), given on the command line, or assumed.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # from a checkout that isn't installed

from trainer.core.units import format_duration
from trainer.telemetry.attempt_files import read_attempts
from trainer.telemetry.expected_goodput import (
    Costs,
    best_interval,
    daly_interval,
    expected_goodput,
    mtbf_seconds,
    young_interval,
)
from trainer.telemetry.run_report import measured_costs

GOAL = 0.97
INTERVALS_SECONDS = (30, 60, 120, 300, 600, 1200, 1800, 3600, 7200)


@dataclass(frozen=True)
class Input:
    """A number and where it comes from."""

    value: float
    source: str


@dataclass(frozen=True)
class Month:
    """One simulated stretch of time."""

    goodput: float
    failures: int
    lost_steps: int


def main() -> None:
    """Print inputs, the table of intervals, the best ones, and what would break the goal."""
    options = arguments().parse_args()
    inputs = gather_inputs(options)
    costs = costs_of(inputs)
    step, days = inputs["step"].value, options.days
    print(f"{options.gpus:,} GPUs, {days:g} days, {options.months} simulated months an interval, seed {options.seed}\n")
    print_inputs(inputs, costs)
    rows: list[list[str]] = []
    simulated: dict[int, float] = {}
    for steps in interval_steps(options.interval_seconds, costs, step):
        mean, error, failures, lost = simulate_many(steps, step, costs, days * 86_400, options.months, options.seed)
        simulated[steps] = mean
        expected = expected_goodput(steps * step, costs)
        rows.append([
            str(steps), format_duration(steps * step), f"{mean:.2%} ± {error:.2%}", f"{expected:.2%}",
            f"{failures:.1f}", f"{lost:.0f}",
        ])  # fmt: skip
    heads = ["every steps", "interval", "goodput, simulated", "closed form", "failures", "lost steps"]
    print_table(heads, rows)
    if options.csv is not None:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([heads, *rows])
    print_best(costs, step, simulated)
    print_limits(costs, step, options.gpus)


def finite_hours(text: str) -> float:
    """Return the hours that an argument names. Raises argparse.ArgumentTypeError."""
    try:
        hours = float(text)
    except ValueError:
        hours = math.nan
    if not 0 < hours < math.inf:
        rule = "must be a finite number above 0: without failures no checkpoint is needed"
        raise argparse.ArgumentTypeError(f"{text}: {rule}; give the hours between two failures of the job")
    return hours


def arguments() -> argparse.ArgumentParser:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1024)
    parser.add_argument("--mtbf-hours", type=finite_hours, help="of the whole job; instead of Llama 3's rate")
    parser.add_argument("--run", type=Path, help="take the costs that this run has measured")
    for name, what in (
        ("step", "one optimizer step"),
        ("blocked", "training stands for a save"),
        ("durable", "from the begin of a save until it is durable"),
        ("restore", "verifying and loading a checkpoint"),
        ("detection", "from a failure until the job ends"),
        ("restart", "from there to the restore: queue, start, imports, building"),
    ):
        parser.add_argument(f"--{name}-seconds", type=float, help=what)
    parser.add_argument("--file-system-gb-per-second", type=float, default=100.0, help="of all ranks together")
    parser.add_argument("--interval-seconds", type=float, nargs="+", default=INTERVALS_SECONDS)
    parser.add_argument("--days", type=float, default=30.0)
    parser.add_argument("--months", type=int, default=200, help="simulated for each interval")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path)
    return parser


def gather_inputs(options: argparse.Namespace) -> dict[str, Input]:
    """Return every input: of the command line, else of the run, else of the benchmarks, else assumed."""
    inputs = benchmark_inputs(options.gpus, options.file_system_gb_per_second)
    inputs |= {
        "step": Input(10.0, "assumed"),
        "detection": Input(600.0, "assumed: a hang that is noticed after 10 minutes"),
        "restart": Input(300.0, "assumed: requeue, start, imports, building the engine"),
    }
    if options.run is not None:
        found = measured_costs(read_attempts(options.run))
        of_run = {
            "step": found.step_seconds, "blocked": found.save_blocked_seconds, "durable": found.save_durable_seconds,
            "restore": found.restore_seconds, "restart": found.startup_seconds,
        }  # fmt: skip
        inputs |= {name: Input(value, f"measured in {options.run}") for name, value in of_run.items() if value}
    given = {name: getattr(options, f"{name}_seconds") for name in inputs}
    inputs |= {name: Input(value, "given") for name, value in given.items() if value is not None}
    rate = Input(mtbf_seconds(options.gpus), "Llama 3: 419 failures in 54 days on 16,384 GPUs")
    given_rate = options.mtbf_hours
    return inputs | {"mtbf": rate if given_rate is None else Input(given_rate * 3600, "given")}


def benchmark_inputs(gpus: int, gb_per_second: float) -> dict[str, Input]:
    """Return what docs/benchmarks/ measured of saving and loading 0.8 GB a rank, bounded by a shared file system."""
    saving = _rows("checkpoint.csv")
    loading = [row for row in _rows("reshape.csv") if row["subject"].endswith("(as written)")]
    bytes_a_rank = statistics.median(float(row["bytes"]) for row in saving) / 2
    blocked = statistics.median(float(row["lost"]) for row in saving)
    durable = statistics.median(float(row["durable"]) for row in saving)
    seconds_a_byte = statistics.median(float(row["seconds"]) / float(row["bytes_read"]) for row in loading)
    shared = bytes_a_rank * gpus / (gb_per_second * 1e9)
    size = f"{bytes_a_rank / 1e9:.2f} GB a rank"
    bound = f"assumed: {size} by {gpus:,} ranks at {gb_per_second:g} GB/s"
    restore = bytes_a_rank * seconds_a_byte
    measured = "measured (docs/benchmarks.md"
    return {
        "blocked": Input(blocked, f"{measured}#saving, {size}: stood still, and slower steps beside it)"),
        "durable": max(Input(durable, f"{measured}#saving, {size})"), Input(shared, bound), key=lambda one: one.value),
        "restore": max(
            Input(restore, f"{measured}#loading-at-another-shape, {size})"),
            Input(2 * shared, f"{bound}, read twice"),  # once to verify it
            key=lambda one: one.value,
        ),
    }


def _rows(name: str) -> list[dict[str, str]]:
    with (ROOT / "docs" / "benchmarks" / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def costs_of(inputs: dict[str, Input]) -> Costs:
    """Return the inputs as the closed form takes them."""
    return Costs(
        mtbf_seconds=inputs["mtbf"].value,
        blocked_seconds=inputs["blocked"].value,
        durable_seconds=max(inputs["durable"].value, inputs["blocked"].value),
        restore_seconds=inputs["restore"].value,
        downtime_seconds=inputs["detection"].value + inputs["restart"].value,
    )


def interval_steps(intervals_seconds: list[float], costs: Costs, step_seconds: float) -> list[int]:
    """Return the intervals to simulate in steps, the closed form's best one among them."""
    steps = {max(1, round(seconds / step_seconds)) for seconds in intervals_seconds}
    if math.isfinite(best := best_interval(costs, step_seconds)):
        # Rounded up: just below the time until a save is durable the next one would have to wait.
        steps.add(math.ceil(best / step_seconds))
    return sorted(steps)


def simulate_many(
    every_steps: int, step_seconds: float, costs: Costs, horizon_seconds: float, months: int, seed: int
) -> tuple[float, float, float, float]:
    """Return mean goodput, half its 95 % confidence interval, mean failures and mean lost steps."""
    # The same failures for every interval: differences between rows are not luck.
    runs = [
        simulate(every_steps, step_seconds, costs, horizon_seconds, random.Random(f"{seed}/{month}"))
        for month in range(months)
    ]
    goodputs = [run.goodput for run in runs]
    error = 1.96 * statistics.stdev(goodputs) / math.sqrt(months) if months > 1 else math.inf
    failures = statistics.fmean(run.failures for run in runs)
    return statistics.fmean(goodputs), error, failures, statistics.fmean(run.lost_steps for run in runs)


def simulate(
    every_steps: int, step_seconds: float, costs: Costs, horizon_seconds: float, random_source: random.Random
) -> Month:
    """Return what becomes of one stretch of ``horizon_seconds``, step by step, save by save, failure by failure.

    The first start is free of downtime and restore. Steps that are done and not lost at the end count.
    """
    rate = 0.0 if math.isinf(costs.mtbf_seconds) else 1 / costs.mtbf_seconds
    now, durable, done, failures, lost, restore = 0.0, 0, 0, 0, 0, 0.0
    while now < horizon_seconds:
        failure_at = now + random_source.expovariate(rate) if rate else math.inf
        done, durable = run_until(
            min(failure_at, horizon_seconds), now + restore, durable, every_steps, step_seconds, costs
        )
        if failure_at >= horizon_seconds:
            break
        failures += 1
        lost += done - durable
        done = durable
        now, restore = failure_at + costs.downtime_seconds, costs.restore_seconds
    return Month(done * step_seconds / horizon_seconds, failures, lost)


def run_until(
    end: float, now: float, step: int, every_steps: int, step_seconds: float, costs: Costs
) -> tuple[int, int]:
    """Train from ``now`` to ``end``, continuing at ``step``; return (steps done, step of the newest durable save)."""
    durable, saving_step, saved_at = step, step, 0.0
    while (worked := now + every_steps * step_seconds) <= end:
        now, step = worked, step + every_steps
        now = max(now, saved_at)  # at most one save is in flight
        if now > end:
            break
        durable = saving_step
        saving_step, saved_at = step, now + costs.durable_seconds
        now += costs.blocked_seconds
    else:
        step += max(0, int((end - now) / step_seconds))
    return step, saving_step if saved_at <= end else durable


def print_inputs(inputs: dict[str, Input], costs: Costs) -> None:
    """Print every input and where it comes from."""
    rows = [[name, _seconds(one.value), one.source] for name, one in inputs.items()]
    print_table(["input", "seconds", "source"], rows)
    print(f"A failure of the job every {format_duration(costs.mtbf_seconds)} on average.\n")


def print_best(costs: Costs, step: float, simulated: dict[int, float]) -> None:
    """Print the best interval of the simulation, and what Young, Daly and the closed form say."""
    best = max(simulated, key=lambda steps: simulated[steps])
    print(f"Best simulated: every {best} steps ({format_duration(best * step)}), goodput {simulated[best]:.2%}.")
    for name, interval in (
        ("Young, sqrt(2 C M)", young_interval(costs)),
        ("Daly, higher order", daly_interval(costs)),
        ("closed form's maximum", best_interval(costs, step)),
    ):
        if math.isfinite(interval) and interval > 0:
            expected = expected_goodput(max(step, interval), costs)
            print(f"{name}: {format_duration(interval)}, expected goodput there {expected:.2%}")
    print()


def print_limits(costs: Costs, step: float, gpus: int) -> None:
    """Print how far each cost alone may rise, the interval chosen anew each time, before the goal is missed."""

    def reached(changed: Costs) -> bool:
        return expected_goodput(best_interval(changed, step), changed) >= GOAL

    if not reached(costs):
        print(f"{GOAL:.0%} is not reached, whatever the interval.")
        return
    print(f"{GOAL:.0%} would be missed, each alone and the interval chosen anew,")
    durable = costs.durable_seconds
    changes: list[tuple[str, Callable[[float], Costs], float]] = [
        ("with downtime above", lambda x: replace(costs, downtime_seconds=x), costs.downtime_seconds),
        ("with a restore above", lambda x: replace(costs, restore_seconds=x), costs.restore_seconds),
        (
            "with saves that stop training for more than",
            lambda x: replace(costs, blocked_seconds=x, durable_seconds=max(x, durable)),
            costs.blocked_seconds,
        ),
        ("with saves durable later than", lambda x: replace(costs, durable_seconds=x), costs.durable_seconds),
    ]
    for words, change, now in changes:
        limit = bisect(lambda x, change=change: reached(change(x)), now)
        print(f"- {words} {format_duration(limit)} (now {_seconds(now)} s)")
    most = bisect(lambda x: reached(replace(costs, mtbf_seconds=costs.mtbf_seconds / x)), 1.0)
    print(f"- with failures {most:.1f} times as often, or, at the same costs, on more than {int(gpus * most):,} GPUs")
    fixed = bisect(lambda x: expected_goodput(x, costs) >= GOAL, best_interval(costs, step))
    print(f"- with a save only every {format_duration(fixed)} or more")


def bisect(holds: Callable[[float], bool], start: float) -> float:
    """Return, to 0.1 %, the largest value for which ``holds`` is true; it is at ``start``."""
    low = max(start, 1e-3)
    high = 2 * low
    while holds(high):
        low, high = high, 2 * high
    while high - low > 1e-3 * low:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def print_table(heads: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    print("\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n")


def _seconds(value: float) -> str:
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


if __name__ == "__main__":
    main()
