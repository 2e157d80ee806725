"""When a job may go back into the queue. The commands themselves: tests/integration/test_slurm_cluster.py."""

from __future__ import annotations

import json
import time

import pytest

from trainer.core.status_file import write_status
from trainer.launch.requeue import MAXIMUM_RESTARTS, main, reason_not_to_requeue

pytestmark = pytest.mark.fast
STOPPED = {"state": "stopped", "exit_code": 75}


def test_stopped_run_goes_on(tmp_path):
    started = time.time()
    write_status(tmp_path, STOPPED)
    assert reason_not_to_requeue(tmp_path, started, {}) is None
    assert reason_not_to_requeue(tmp_path, started, {"SLURM_RESTART_COUNT": str(MAXIMUM_RESTARTS - 1)}) is None


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"state": "finished", "exit_code": 0}, "state finished"),
        ({"state": "failed", "exit_code": 93}, "state failed, exit code 93"),
        ({"state": "stopped", "exit_code": 0}, "exit code 0"),
        ({"state": "running"}, "state running"),
        ({}, "state None"),
    ],
)
def test_any_other_end_stays_ended(tmp_path, fields, why):
    write_status(tmp_path, fields)
    assert why in (reason_not_to_requeue(tmp_path, time.time(), {}) or "")


def test_restarts_are_bounded(tmp_path):
    write_status(tmp_path, STOPPED)
    for count in (str(MAXIMUM_RESTARTS), "1000", "-1", "x"):
        assert "restarted" in (reason_not_to_requeue(tmp_path, 0.0, {"SLURM_RESTART_COUNT": count}) or "")


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '"stopped"', '{"state": "stopped", "exit_code": 75}'])
def test_unreadable_or_undated_status_requeues_nothing(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    assert reason_not_to_requeue(tmp_path, 0.0, {}) is not None
    assert reason_not_to_requeue(tmp_path / "missing", 0.0, {}) == "the run left no status.json"


def test_status_of_an_earlier_attempt_counts_for_nothing(tmp_path):
    (tmp_path / "status.json").write_text(json.dumps({**STOPPED, "updated_unix": time.time() - 60}))
    assert "not written by this attempt" in (reason_not_to_requeue(tmp_path, time.time(), {}) or "")


def test_command_says_why_not(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1; id")
    write_status(tmp_path, STOPPED)
    assert main([str(tmp_path), "--since", "0"]) == 1
    assert "is not a SLURM job id" in capsys.readouterr().err
