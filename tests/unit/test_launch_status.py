"""`trainer status` and the record of submitted jobs, without a cluster."""

from __future__ import annotations

import json
import stat
import time

import pytest

from trainer.core.errors import RefusedError
from trainer.core.status_file import write_status
from trainer.launch.status import collect
from trainer.launch.status_text import describe
from trainer.launch.submit import recorded_jobs, write_script
from trainer.telemetry.attempt_files import write_times
from trainer.telemetry.attempt_times import AttemptTimes

pytestmark = pytest.mark.fast


@pytest.fixture
def no_slurm(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("PATH", str(tmp_path_factory.mktemp("empty")))


def write_metrics(directory, lines, tail=""):
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def step_line(step, at, seconds=2.0):
    return {"step": step, "loss": 10.0 - step, "tokens_per_second": 1500.0, "step_seconds": seconds, "time_unix": at}


def test_running_run(tmp_path):
    write_status(tmp_path, {"state": "running", "step": 3, "total_steps": 10, "restarts": 1})
    (tmp_path / "attempts" / "0001").mkdir(parents=True)
    begin = {"kind": "evaluation", "step": 0, "validation_loss": 11.0, "time_unix": 1000.0}
    write_metrics(tmp_path, [begin, *(step_line(n, 1000.0 + 5 * n) for n in (1, 2, 3, 4))], tail='{"step": 5, "lo')
    found = collect(tmp_path)
    assert (found.step, found.total_steps, found.loss, found.tokens_per_second) == (4, 10, 6.0, 1500.0)
    assert found.remaining_seconds == pytest.approx(12.0)
    assert found.goodput_fraction is None  # no start has left its times
    times = AttemptTimes(attempt=1, resumed_step=0, started_unix=1000.0, allocated_since_unix=1000.0)
    times.updated_unix = 1003.0  # four steps of 2 s until 1020 stand in metrics.jsonl alone
    write_times(tmp_path, times)
    found = collect(tmp_path)
    assert found.goodput_fraction == pytest.approx(8 / 20)
    text = describe(found)
    assert "4 of 10 (40.0%), 12s left" in text
    assert "goodput     40.0% (" in text
    assert "1.50k" in text
    assert json.loads(found.to_json())["restarts"] == 1


def test_stopped_run_has_no_time_left(tmp_path):
    write_status(tmp_path, {"state": "stopped", "step": 3, "total_steps": 10, "exit_code": 75, "reason": "SIGUSR1"})
    write_metrics(tmp_path, [step_line(3, time.time())])
    found = collect(tmp_path)
    assert found.remaining_seconds is None
    assert "stopped (exit code 75): SIGUSR1" in describe(found)


def test_job_without_slurm_here(tmp_path, no_slurm):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs.json").write_text(json.dumps({"jobs": [{"id": "7"}, {"id": "8; id"}, {"id": "9"}, 3]}))
    assert recorded_jobs(tmp_path) == ["7", "9"]
    found = collect(tmp_path)
    assert (found.job_id, found.job_state) == ("9", None)
    assert "squeue is not installed here" in describe(found)
    assert "not started" in describe(found)


@pytest.mark.parametrize(
    "junk", [b"", b"[]", b"\xff\xfe", b'{"state": 3, "step": "x", "restarts": NaN}', b"[" * 100_000]
)
def test_damaged_files_are_passed_over(tmp_path, junk):
    for name in ("status.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes(junk)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs.json").write_bytes(junk)
    (tmp_path / "checkpoints").mkdir(parents=True)
    # A checkpoint directory makes it a run whatever the files say.
    (tmp_path / "checkpoints" / "step-00000005").mkdir()
    manifest = {"format": "trainer-checkpoint", "version": 1, "step": 5, "files": {}}
    (tmp_path / "checkpoints" / "step-00000005" / "manifest.json").write_text(json.dumps(manifest))
    found = collect(tmp_path)
    assert (found.step, found.loss, found.restarts, found.job_id) == (None, None, None, None)
    assert "checkpoint  step 5" in describe(found)


@pytest.mark.parametrize("make", [False, True])
def test_no_run_is_refused(tmp_path, make):
    directory = tmp_path / "nothing"
    if make:
        directory.mkdir()
    with pytest.raises(RefusedError) as error:
        collect(directory)
    assert error.value.exit_code == 2


def test_scripts_are_numbered_and_private(tmp_path, monkeypatch):
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    (bin_directory / "sbatch").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(bin_directory))
    run = tmp_path / "run"
    paths = [write_script(run, f"script {number}") for number in range(3)]
    assert [path.name for path in paths] == [f"submit-000{number}.sbatch" for number in (1, 2, 3)]
    assert paths[1].read_text() == "script 1"
    assert stat.S_IMODE(paths[0].parent.stat().st_mode) == 0o700
    assert (run / "logs").is_dir()


def test_without_sbatch_nothing_is_written(tmp_path, no_slurm):
    with pytest.raises(RefusedError, match="login node"):
        write_script(tmp_path / "run", "text")
    assert not (tmp_path / "run").exists()
