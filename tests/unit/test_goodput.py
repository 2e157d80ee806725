"""Where the time of a run went: parts that add up, steps that count once, files that may be damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from trainer.cli.main import app
from trainer.core.environ import allocated_since
from trainer.core.errors import RefusedError
from trainer.core.status_file import read_status, write_status
from trainer.launch.failure import note_in_status
from trainer.telemetry.attempt_files import close_books, read_attempts, timing_path, write_times
from trainer.telemetry.attempt_times import AttemptTimes
from trainer.telemetry.goodput import PARTS, divide, goodput, split_text
from trainer.telemetry.run_report import collect_report, describe_report

pytestmark = pytest.mark.fast


def attempt(
    number: int, since: float, first: int, last: int, *, ended: float, seconds: float = 2.0, **fields: Any
) -> AttemptTimes:
    """Start 10 s into the allocation, train from 40 s on, each step 2 s."""
    times = AttemptTimes(attempt=number, allocated_since_unix=since, started_unix=since + 10, **fields)
    times.resumed_step = times.base_step = times.last_step = first
    for index, step in enumerate(range(first + 1, last + 1), 1):
        times.add_step(step, seconds, since + 40 + index * seconds)
    times.updated_unix = times.ended_unix = ended
    return times


def killed_once() -> list[AttemptTimes]:
    first = attempt(1, 1000.0, 0, 33, ended=1120.0, evaluation_seconds=3.0, save_seconds=1.5, world_size=4)
    second = attempt(2, 1200.0, 20, 50, ended=1310.0, restore_seconds=12.0, outcome="finished", world_size=4)
    return [first, second]


def test_a_run_that_lost_thirteen_steps() -> None:
    first, second = divide(killed_once())
    assert (first.counted_steps, first.lost_steps, second.counted_steps, second.lost_steps) == (20, 13, 30, 0)
    assert (first.productive_seconds, first.redone_seconds) == (40.0, 26.0)
    assert (first.allocated_seconds, first.startup_seconds, first.evaluation_seconds) == (
        120.0,
        37.0,
        3.0,
    )  # evaluated before the first step
    assert (first.save_seconds, first.other_seconds) == (1.5, 120 - 40 - 26 - 3 - 1.5 - 37)
    assert (second.waiting_seconds, second.allocated_seconds) == (80.0, 110.0)
    assert (second.productive_seconds, second.restore_seconds, second.startup_seconds) == (60.0, 12.0, 28.0)
    found = goodput(killed_once())
    assert found is not None
    assert found.fraction == pytest.approx(100 / 230)
    assert (found.restarts, found.steps, found.lost_steps, found.waiting_seconds) == (1, 50, 13, 80.0)
    assert found.rank_hours == pytest.approx(230 * 4 / 3600)
    assert split_text(found.fractions).startswith("43.5% (start-up 28.3%, redone 11.3%, other ")


def test_attempts_weigh_as_much_as_they_have_ranks() -> None:
    first, second = killed_once()
    first.world_size = 12
    found = goodput([first, second])
    assert found is not None
    assert found.fraction == pytest.approx((40 * 12 + 60 * 4) / (120 * 12 + 110 * 4))
    assert sum(found.fractions.values()) == pytest.approx(1.0)
    assert found.productive_seconds == 100.0  # of wall time


def test_time_between_two_starts_of_one_allocation_is_allocated() -> None:
    first, second = killed_once()
    second.allocated_since_unix = first.allocated_since_unix
    parts = divide([first, second])
    assert parts[1].waiting_seconds == 0.0
    assert parts[1].allocated_seconds == 1310 - 1120
    assert parts[1].startup_seconds == 1240 - 1120 - 12


def test_a_hang_is_other_time() -> None:
    first, second = killed_once()
    first.updated_unix = first.ended_unix = 1190.0  # its thread went on writing until the watchdog came
    assert divide([first, second])[0].other_seconds == pytest.approx(12.5 + 70)


def test_a_second_restart_may_go_back_further_than_the_first() -> None:
    """Say its checkpoint was found damaged: steps of the first attempt are lost as well."""
    attempts = [*killed_once(), attempt(3, 1400.0, 10, 60, ended=1600.0)]
    attempts[1].outcome = None
    assert [part.lost_steps for part in divide(attempts)] == [23, 30, 0]
    assert [part.counted_steps for part in divide(attempts)] == [10, 0, 50]


def test_a_start_that_never_got_to_its_checkpoint_loses_nothing() -> None:
    broken = AttemptTimes(attempt=2, allocated_since_unix=1150.0, started_unix=1150.0, updated_unix=1160.0)
    broken.outcome = "failed"
    first, second = killed_once()
    second.attempt = 3
    parts = divide([first, broken, second])
    assert [part.lost_steps for part in parts] == [13, 0, 0]
    assert parts[1].startup_seconds == parts[1].allocated_seconds == 10.0
    assert divide([first, broken])[0].lost_steps == 0


def test_a_rewind_inside_an_attempt_loses_steps_too() -> None:
    times = attempt(1, 1000.0, 0, 8, ended=1100.0)
    times.add_step(5, 2.0, 1060.0)  # back at step 4
    assert (times.base_step, times.last_step, times.rewound_steps, times.rewound_seconds) == (0, 5, 4, 8.0)
    (part,) = divide([times])
    assert (part.counted_steps, part.lost_steps, part.productive_seconds, part.redone_seconds) == (5, 4, 10.0, 8.0)
    later = attempt(2, 2000.0, 20, 24, ended=2100.0)
    later.add_step(18, 2.0, 2060.0)  # back at step 17, of the attempt before
    assert (later.base_step, later.rewound_steps, later.step_seconds) == (17, 4, 2.0)
    before = attempt(1, 1000.0, 0, 20, ended=1100.0)
    assert [part.lost_steps for part in divide([before, later])] == [3, 4]


def test_a_long_attempt_keeps_few_marks_and_still_knows_its_steps() -> None:
    times = AttemptTimes(attempt=1, resumed_step=0)
    for step in range(1, 100_001):
        times.add_step(step, 1.0 if step <= 50_000 else 3.0, float(step))
    assert len(times.marks) <= 200
    assert len(json.dumps(times.to_json())) < 8000
    for step in (0, 1, 777, 50_000, 99_999, 100_000):
        exact = min(step, 50_000) + 3.0 * max(0, step - 50_000)
        near_change = 2.0 * times.mark_every if step == 50_000 else 1e-6  # between marks steps count as equally long
        assert times.seconds_through(step) == pytest.approx(exact, rel=1e-9, abs=near_change)


numbers = st.floats(0, 1e6) | st.floats() | st.integers(-5, 10**7)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from([*AttemptTimes.__dataclass_fields__, "version"]), numbers), max_size=4))
def test_parts_add_up_whatever_the_files_say(given_files: list[dict[str, Any]]) -> None:
    files = [{"version": 1, "attempt": n, "resumed_step": 0} | given for n, given in enumerate(given_files, 1)]
    attempts = [times for times in map(AttemptTimes.from_json, files) if times is not None]
    for part in divide(attempts):
        seconds = [getattr(part, f"{name}_seconds") for name, _ in PARTS]
        assert min(seconds) >= 0
        assert math.fsum(seconds) == pytest.approx(part.allocated_seconds)
        assert min(part.counted_steps, part.lost_steps, part.waiting_seconds) >= 0
    found = goodput(attempts)
    if found is not None:
        assert math.fsum(found.fractions.values()) == pytest.approx(1.0)
        assert 0 <= found.fraction <= 1 + 1e-9


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 50), st.integers(0, 40), st.integers(1, 40), st.floats(0, 20)), max_size=5),
)
def test_of_a_sound_run_every_step_counts_once(starts: list[tuple[float, int, int, float]]) -> None:
    attempts, now, newest = [], 1000.0, 0
    for number, (waiting, back, steps, tail) in enumerate(starts, 1):
        resumed = max(0, newest - back)
        since = now + waiting
        now = since + 40 + 2.0 * steps + tail
        attempts.append(attempt(number, since, resumed, resumed + steps, ended=now))
        newest = resumed + steps
    found = goodput(attempts)
    if found is None:
        assert not starts
        return
    assert found.steps == newest
    assert found.steps + found.lost_steps == sum(steps for _, _, steps, _ in starts)
    assert found.productive_seconds == pytest.approx(2.0 * newest)
    assert found.redone_seconds == pytest.approx(2.0 * found.lost_steps)
    assert found.allocated_seconds + found.waiting_seconds == pytest.approx(now - 1000.0 - starts[0][0])
    assert found.other_seconds == pytest.approx(sum(tail for *_, tail in starts), abs=1e-6)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for number in (1, 2, 3):
        timing_path(tmp_path, number).parent.mkdir(parents=True)
    return tmp_path


def test_files_come_back_as_they_were(run: Path) -> None:
    for times in killed_once():
        write_times(run, times)
    assert read_attempts(run)[1] == killed_once()[1]
    timing_path(run, 3).write_text('{"version": 1, "attempt": 3, "st')
    assert [times.attempt for times in read_attempts(run)] == [1, 2]
    timing_path(run, 1).write_bytes(b"[" * 100_000)
    assert [times.attempt for times in read_attempts(run)] == [2]


def step_line(step: int, at: float, seconds: float = 2.0) -> str:
    return json.dumps({"step": step, "step_seconds": seconds, "time_unix": at}) + "\n"


def test_what_a_killed_attempt_did_last_stands_in_metrics(run: Path) -> None:
    """Its own file is up to five seconds old; every second step is logged, and one line is of the attempt before."""
    killed = attempt(1, 1000.0, 0, 10, ended=1061.0)
    killed.ended_unix = None
    write_times(run, killed)
    lines = [step_line(12, 990.0), step_line(10, 1060.0), step_line(12, 1064.0), step_line(14, 1069.0, 2.5)]
    (run / "metrics.jsonl").write_text("".join(lines) + '{"step": 15, "st')
    (times,) = read_attempts(run)
    assert (times.last_step, times.step_seconds, times.end_unix) == (14, 20 + 4 + 5, 1069.0)
    assert read_attempts(run)[0].last_step == 14  # the file was only read
    close_books(run)
    (run / "metrics.jsonl").unlink()
    assert read_attempts(run)[0].last_step == 14


def test_others_say_how_a_killed_attempt_ended(run: Path) -> None:
    killed, second = killed_once()
    killed.ended_unix = None
    write_times(run, killed)
    write_status(run, {"state": "failed", "attempt": 1, "reason": "the ranks ended without a word"})
    assert read_attempts(run)[0].reason == "the ranks ended without a word"
    failure = {"version": 1, "time_unix": 1150.0, "class": "hang", "cause": "rank 3 on node2 hangs in forward"}
    (run / "failure.json").write_text(json.dumps(failure))
    (times,) = read_attempts(run)
    assert (times.end_unix, times.outcome, times.reason) == (1150.0, "failed", "rank 3 on node2 hangs in forward")
    (run / "failure.json").write_text(json.dumps(failure | {"time_unix": 900.0}))  # of an older failure
    (times,) = read_attempts(run)
    assert (times.end_unix, times.reason) == (1120.0, "the ranks ended without a word")  # said 50 years later
    killed.launch = "slurm-17-0-1"
    write_times(run, killed)
    for launch, reason in (("slurm-17-0-1", failure["cause"]), ("slurm-17-1-0", "the ranks ended without a word")):
        (run / "failure.json").write_text(json.dumps(failure | {"launch": launch}))
        assert read_attempts(run)[0].reason == reason, "the nodes of another start are no fault of this one"
    second.outcome, second.ended_unix = None, None
    (run / "status.json").unlink()
    write_times(run, second)
    assert read_attempts(run)[0].outcome is None  # what others say is of the newest


def test_a_report_of_a_restarted_run_names_each_start(run: Path) -> None:
    for times in killed_once():
        write_times(run, times)
    fields = {"state": "finished", "step": 50, "total_steps": 50, "best_validation_loss": 2.5, "best_step": 40}
    write_status(run, fields | {"last_checkpoint_step": 50})
    (run / "metrics.jsonl").write_text(json.dumps({"step": 50, "tokens": 1_000_000, "loss": 2.0}) + "\n")
    lines = describe_report(collect_report(run))
    assert lines[0] == "state       finished"
    assert "steps       50 of 50, 1.00M tokens" in lines
    assert "time        3m 50s in 2 starts (0.256 rank-hours), and 1m 20s between them" in lines
    assert "restarts    1, 13 steps lost" in lines
    assert "            1: steps 1-33, 13 lost, 2m 00s, killed" in lines
    assert "            2: steps 21-50, 1m 50s, finished" in lines
    assert lines[-2:] == ["validation  best loss 2.5000 at step 40", "checkpoint  step 50"]


def test_a_killed_run_is_told_by_the_newest_that_is_known(run: Path) -> None:
    write_times(run, attempt(1, 1000.0, 0, 5, ended=1052.0))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 5, "tokens": 1280, "loss": 2.0}) + "\n")
    for said, step in ((0, 5), (None, 5), (6, 6)):  # not every step is logged
        write_status(run, {"state": "running", "step": said, "total_steps": 8})
        assert f"steps       {step} of 8, 1.28k tokens" in describe_report(collect_report(run))


def test_a_start_that_had_no_number_yet_is_not_the_end_of_the_one_before(run: Path) -> None:
    """Killed at 1120; the job waits in the queue, and its next start fails at 1500, before it says it is one."""
    killed, _ = killed_once()
    killed.ended_unix, killed.launch = None, "slurm-17-0-0"
    write_times(run, killed)
    write_status(run, {"state": "running", "attempt": 1, "step": 33})
    cause = "rank 0 ended in start"
    failure = {"version": 1, "time_unix": 1500.0, "class": "killed", "cause": cause, "launch": "slurm-17-0-1"}
    (run / "failure.json").write_text(json.dumps(failure))
    note_in_status(run, 1, cause, began=False, replaces_reason=False)
    status = read_status(run)
    assert status is not None
    assert (status["state"], status["reason"], status.get("attempt")) == ("failed", cause, None)
    (run / "status.json").write_text(json.dumps(status | {"updated_unix": 1500.0}))
    (times,) = read_attempts(run)
    assert (times.end_unix, times.outcome, times.reason) == (1120.0, None, None)
    write_status(run, {"state": "running", "attempt": 1, "step": 33})
    note_in_status(run, 1, cause, began=True, replaces_reason=False)
    status = read_status(run)
    assert status is not None
    assert (status["reason"], status["attempt"]) == (cause, 1)


def test_a_report_of_an_undisturbed_run_is_two_lines(run: Path) -> None:
    write_times(run, attempt(1, 1000.0, 0, 30, ended=1105.0, saves=1, save_seconds=2.0, outcome="finished"))
    write_status(run, {"state": "finished", "step": 30, "total_steps": 30, "last_checkpoint_step": 30})
    lines = describe_report(collect_report(run))
    assert len(lines) == 2
    assert "goodput 57.1% (start-up 38.1%, other 2.9%, saves 1.9%)" in lines[0]
    assert lines[1] == "last checkpoint: step 30"
    done = CliRunner().invoke(app, ["report", str(run), "--mtbf-hours", "1"])
    assert done.exit_code == 0
    # C = 2 s, M = 3600 s: sqrt(2 C M) = 120 s = 60 steps
    assert "checkpoint.every_steps=60 (2m 00s)" in done.stdout or "checkpoint.every_steps=59" in done.stdout
    assert "Young 2m 00s" in done.stdout
    with pytest.raises(RefusedError, match="--mtbf-hours = inf: must be a finite number"):
        CliRunner().invoke(app, ["report", str(run), "--mtbf-hours", "inf"], catch_exceptions=False)
    found = json.loads(CliRunner().invoke(app, ["report", str(run), "--json"]).stdout)
    assert found["goodput"]["fraction"] == pytest.approx(60 / 105)
    assert found["attempts"][0]["outcome"] == "finished"


def test_no_run_has_no_report(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(tmp_path / "nothing")])
    assert done.exit_code != 0
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"TRAINER_ALLOCATED_SINCE": "1700000000"}, 1.7e9),
        ({"TRAINER_ALLOCATED_SINCE": "1700000060", "SLURM_JOB_START_TIME": "1700000000"}, 1.7e9),
        ({"TRAINER_ALLOCATED_SINCE": "soon", "SLURM_JOB_START_TIME": "-5"}, None),
    ],
)
def test_when_the_nodes_were_handed_over(variables: dict[str, str], expected: float | None) -> None:
    assert allocated_since(variables) == expected
