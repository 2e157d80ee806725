"""What SLURM and people do to a job that is well: time limit, signals, requeue, cancel; real training throughout."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from slurm_runs import SlurmRun, sections, undisturbed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
STEPS = 40
"""Of the run that meets signals."""
SUSPENDED_STEPS = 12
LIMITED_STEPS = 5
"""Of the run with a time limit. The learning rate is constant: both take the first steps of the same."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Data, and the exact lines of the undisturbed run."""
    directory = tmp_path_factory.mktemp("undisturbed")
    return directory, undisturbed(directory, STEPS)


def test_time_limit(slurm_cluster, reference, tmp_path):
    """Saved before the limit, requeued by itself, twice or more; nothing of it can be seen in the results."""
    # SLURM looks every 30 s, so the signal comes up to half a minute early, soon after the start.
    recipe = sections(LIMITED_STEPS, "1", signal_seconds=1)
    run = SlurmRun(slurm_cluster, reference[0], tmp_path / "run 50%", recipe)
    # Waits for the signal in two of the steps, so that it can't be done sooner. On a slow machine an attempt may get no
    # further than one step.
    job = run.submit("train.step:*:2:pause100,train.step:*:4:pause100")
    assert slurm_cluster.wait(job, timeout=600) == "COMPLETED", run.log()
    restarts = int(slurm_cluster.fields(job)["Restarts"])
    assert restarts >= 2
    assert run.exact_lines() == reference[1][:LIMITED_STEPS]
    attempts = run.attempts()
    assert [attempt["decision"] for attempt in attempts] == ["requeue"] * restarts + ["done"]
    assert len(list((run.directory / "attempts").glob("0*"))) == restarts + 1
    files = sorted((run.directory / "tensorboard").rglob("events*"))
    events = [EventAccumulator(str(file)).Reload() for file in files]
    losses = [
        point for each in events if "train/loss" in each.Tags()["scalars"] for point in each.Scalars("train/loss")
    ]
    assert sorted(point.step for point in losses) == list(range(1, LIMITED_STEPS + 1)), "no overlap"

    log = run.log()
    assert [log.count(f"===== job {job}, restart {number}, nodes node") for number in range(restarts + 1)] == [1] * (
        restarts + 1
    )
    for rank in range(4):
        text = (run.directory / "logs" / f"rank-{rank:05d}.log").read_text()
        assert text.count("rank") > restarts  # appended


def test_suspended(slurm_cluster, reference, tmp_path):
    """A job that stands for longer than a hang may last is none, and the time counts for no step."""
    recipe = sections(SUSPENDED_STEPS) | {"resilience": {"watchdog": {"grace_seconds": 4, "report_seconds": 0}}}
    run = SlurmRun(slurm_cluster, reference[0], tmp_path / "run", recipe)
    job = run.submit("train.step:*:*:pause0.3")
    run.wait_for_step(4)
    assert slurm_cluster.run(["scontrol", "suspend", job]).returncode == 0
    stood_at = run.last_step
    time.sleep(15)
    assert run.last_step <= stood_at + 1, "it was not suspended"
    assert slurm_cluster.run(["scontrol", "resume", job]).returncode == 0
    assert slurm_cluster.wait(job, timeout=240) == "COMPLETED", run.log()
    assert run.exact_lines() == reference[1][:SUSPENDED_STEPS]
    assert [attempt["decision"] for attempt in run.attempts()] == ["done"]
    assert max(line["step_seconds"] for line in run.lines()) < 10


def test_signals_requeue_and_cancel(slurm_cluster, reference, tmp_path):
    """One run meets in turn what SLURM and people may do, loses nothing, and ends as if nothing had happened."""
    run = SlurmRun(slurm_cluster, reference[0], tmp_path / "elsewhere" / "run", sections(STEPS))
    # Each step takes a while, each save long enough to be met by a second signal.
    job = run.submit("train.step:*:*:pause0.3,checkpoint.before_shard:*:*:pause0.7")
    met = [
        ["scancel", "-s", "USR1", job],
        ["scancel", "-b", "-s", "USR1", job],
        ["scancel", "-s", "TERM", job],  # to the steps alone, as preemption with a grace time
        ["scontrol", "requeue", job],
        ["scancel", job],
    ]
    for restart, command in enumerate(met):
        slurm_cluster.wait_for_start(job, restart, timeout=120)
        run.wait_for_step(run.last_step + 2)
        if restart == 1:
            refused = run.submit_again()
            assert slurm_cluster.wait(refused) == "FAILED"
            assert slurm_cluster.fields(refused)["ExitCode"] == "2:0"
        done = run.last_step
        assert slurm_cluster.run(command).returncode == 0
        if restart == 0:
            run.wait_until(lambda: run.saving or run.checkpoint() > 4, "save", 60)
            slurm_cluster.run(["scancel", "-s", "USR2", job])
        # A requeue is noted as soon as SLURM says so, and again with what the ranks have saved.
        ended = lambda number=restart, least=done: (  # noqa: E731
            run.attempt(job, number)["decision"] != "running" and run.attempt(job, number)["step"] >= least
        )
        run.wait_until(ended, "end of the attempt with all its steps")
        if command[0] == "scancel":
            assert run.json("status.json")["exit_code"] == 75
    assert slurm_cluster.wait(job) == "CANCELLED"
    decisions = [attempt["decision"] for attempt in run.attempts() if attempt["job"] == job]
    assert decisions == ["requeue", "requeue", "requeue", "scheduler", "stop"], run.log()

    last = run.submit()
    assert slurm_cluster.wait(last, timeout=240) == "COMPLETED", run.log()
    assert run.exact_lines() == reference[1]
    log = run.log()
    assert "another job is training here" in log
    assert [log.count(f"===== job {job}, restart {number}, ") for number in range(6)] == [1] * 5 + [0]
    again = run.submit_again()
    assert slurm_cluster.wait(again) == "COMPLETED"
