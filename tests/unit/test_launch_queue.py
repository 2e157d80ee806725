"""What SLURM says of jobs, in the shapes of its releases; commands that answer are small programs on PATH."""

from __future__ import annotations

import json
import os
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.core.errors import TrainerError
from trainer.core.status_file import write_status
from trainer.launch import queue
from trainer.launch.cancel import cancel
from trainer.launch.queue import Job, Queue, ask_queue, expand_tasks
from trainer.launch.status import collect
from trainer.launch.status_text import describe

pytestmark = pytest.mark.fast
OLD = {
    "job_id": 7, "array_job_id": 0, "array_task_id": None, "array_task_string": "", "job_state": "RUNNING",
    "state_reason": "None", "start_time": 1000, "end_time": 5000, "nodes": "node[1-2]", "restart_cnt": 2,
    "user_name": "me",
}  # fmt: skip
NEW = {
    "job_id": 7, "array_job_id": {"set": True, "infinite": False, "number": 0},
    "array_task_id": {"set": False, "infinite": False, "number": 0}, "array_task_string": "",
    "job_state": ["RUNNING", "COMPLETING"], "state_reason": "None",
    "start_time": {"set": True, "infinite": False, "number": 1000},
    "end_time": {"set": True, "infinite": False, "number": 5000}, "nodes": "node[1-2]", "restart_cnt": 2,
    "user_name": "me",
}  # fmt: skip
RUNNING = Job(
    id="7", state="RUNNING", start_unix=1000, end_unix=5000, nodes="node[1-2]", restarts=2, user="me", reason=None
)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Write commands: each prints what it is given and notes that it was called."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    calls = tmp_path / "calls"

    def write(name, answer="", code=0, error="", json_answer=None, json_code=0, wait=0):
        for suffix, text in (("", answer), (".json", json_answer if json_answer is not None else answer)):
            (directory / f".{name}{suffix}").write_text(text)
        script = directory / name
        script.write_text(
            f'#!/bin/sh\necho "{name} $*" >> {calls}\n[ {wait} = 0 ] || exec sleep {wait}\n'
            f'case "$*" in *--json*) cat {directory}/.{name}.json; exit {json_code};; esac\n'
            f'cat {directory}/.{name}\n[ -z "{error}" ] || echo "{error}" >&2\nexit {code}\n'
        )
        script.chmod(0o755)

    write.calls = lambda: calls.read_text().splitlines() if calls.exists() else []
    for name in ("squeue", "scontrol", "sacct"):
        write(name, code=1, error="Invalid job id specified")
    return write


@pytest.mark.parametrize("shape", [OLD, NEW], ids=["22.05", "24.05"])
def test_json_of_old_and_new_releases(slurm, shape):
    others = {**shape, "job_id": 99}
    slurm("squeue", json_answer=json.dumps({"jobs": [others, shape]}))
    assert ask_queue(["7"]) == Queue((RUNNING,))
    assert len(slurm.calls()) == 1


@pytest.mark.parametrize("shape", [OLD, NEW], ids=["22.05", "24.05"])
def test_tasks_of_an_array(slurm, shape):
    number = (lambda n: n) if shape is OLD else (lambda n: {"set": True, "infinite": False, "number": n})
    state = "PENDING" if shape is OLD else ["PENDING"]
    waiting = {**shape, "job_id": 7, "array_job_id": number(7), "array_task_string": "3-4,6%1", "job_state": state}
    running = {**shape, "job_id": 8, "array_job_id": number(7), "array_task_id": number(2)}
    slurm("squeue", json_answer=json.dumps({"jobs": [waiting, running]}))
    found = ask_queue(["7"])
    assert {job.id: job.state for job in found.of(["7"])} == {
        "7_2": "RUNNING", "7_3": "PENDING", "7_4": "PENDING", "7_6": "PENDING",
    }  # fmt: skip
    assert [job.id for job in found.of(["7_6", "7_2"])] == ["7_6", "7_2"]


def test_lines_where_there_is_no_json(slurm):
    at = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(1000))
    text = f"7|RUNNING|None|{at}|N/A|node[1-2]|me\n8_1|PENDING|Priority|N/A|N/A||me\n"
    slurm("squeue", text, json_answer="", json_code=1)
    jobs = ask_queue(["7", "8"]).jobs
    assert [(job.id, job.state, job.reason, job.start_unix, job.nodes) for job in jobs] == [
        ("7", "RUNNING", None, 1000, "node[1-2]"), ("8_1", "PENDING", "Priority", None, None),
    ]  # fmt: skip


def test_scontrol_then_accounts(slurm):
    shown = (
        "JobId=7 JobName=x UserId=me(0) JobState=COMPLETED Reason=None Restarts=3 StartTime=Unknown NodeList=node1\n"
    )
    slurm("scontrol", shown)
    slurm("sacct", "8|CANCELLED by 1000|Unknown|Unknown|node2|me\n8.batch|CANCELLED|Unknown|Unknown|node2|\n")
    jobs = {job.id: job for job in ask_queue(["7", "8"]).jobs}
    assert (jobs["7"].state, jobs["7"].restarts, jobs["7"].user, jobs["7"].nodes) == ("COMPLETED", 3, "me", "node1")
    assert (jobs["8"].state, jobs["8"].nodes) == ("CANCELLED", "node2")


def test_forgotten_job_without_accounts(slurm):
    slurm("sacct", code=1, error="Slurm accounting storage is disabled")
    assert ask_queue(["7"]) == Queue()
    assert [call.split()[0] for call in slurm.calls()] == ["squeue", "squeue", "scontrol", "sacct"]


def record(tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs.json").write_text('{"jobs": [{"id": "7"}]}')


@pytest.mark.parametrize("known", [False, True], ids=["squeue refuses the id", "squeue prints nothing"])
def test_forgotten_job_where_squeue_knows_no_json(slurm, tmp_path, known):
    write_squeue(tmp_path, "echo \"squeue: unrecognized option '--json'\" >&2; exit 1")
    if known:
        slurm("scontrol", code=1, error="Access denied")
        slurm("sacct", code=1, error="no")
        write_squeue(tmp_path, "echo \"squeue: unrecognized option '--json'\" >&2; exit 1", "exit 0")
    else:
        slurm("sacct", code=1, error="Slurm accounting storage is disabled")
    assert ask_queue(["7"]) == Queue()
    record(tmp_path)
    assert "no longer in the queue" in describe(collect(tmp_path))
    said: list[str] = []
    cancel(tmp_path, now=False, whole_sweep=False, say=said.append)
    assert said == [f"nothing to cancel: all jobs of {tmp_path} are over"]


def write_squeue(tmp_path, json_line, line="echo Invalid job id specified >&2; exit 1"):
    text = f'#!/bin/sh\ncase "$*" in *--json*) {json_line};; *) {line};; esac\n'
    (tmp_path / "bin" / "squeue").write_text(text)


def test_json_of_all_jobs_that_takes_too_long(slurm, monkeypatch, tmp_path):
    monkeypatch.setattr("trainer.launch.slurm_commands._ASK_SECONDS", 1.0)
    write_squeue(tmp_path, "exec sleep 30", "echo '7|RUNNING|None|N/A|N/A|node1|me'")
    found = ask_queue(["7"])
    assert ([job.state for job in found.jobs], found.note) == (["RUNNING"], None)


@pytest.mark.parametrize("changes", [
    {"job_state": []}, {"start_time": 2**64 - 2, "end_time": {"set": True, "infinite": False, "number": 2**64 - 2}},
])  # fmt: skip
def test_answer_that_is_odd_is_shown_all_the_same(slurm, tmp_path, changes):
    row = "7|RUNNING|None|N/A|N/A|node1|me\n"
    slurm("squeue", row, json_answer=json.dumps({"jobs": [{**OLD, **changes}]}))
    record(tmp_path)
    lines = describe(collect(tmp_path)).splitlines()
    assert lines[-1].split()[:4] == ["7", "RUNNING", "-", "-"]


ALIVE = {
    "PENDING": "ended", "REQUEUE_HOLD": "ended", "REQUEUE_FED": "ended", "RESV_DEL_HOLD": "ended",
    "SPECIAL_EXIT": "ended", "LAUNCH_FAILED": "ended", "RUNNING": "asked", "SIGNALING": "asked", "STAGE_OUT": "asked",
    "RESIZING": "asked", "COMPLETING": "asked", "OF_A_LATER_RELEASE": "asked",
}  # fmt: skip


@pytest.mark.parametrize("state", ALIVE)
def test_job_that_is_held_or_alive_is_cancelled(slurm, tmp_path, state):
    slurm("squeue", json_answer=json.dumps({"jobs": [{**OLD, "user_name": "", "job_state": state}]}))
    slurm("scancel")
    record(tmp_path)
    done = cancel(tmp_path, now=False, whole_sweep=False, say=print)
    assert getattr(done, ALIVE[state]) == ["7"]
    assert len(done.ended) + len(done.asked) == 1


@pytest.mark.parametrize("state", ["COMPLETED", "CANCELLED", "OUT_OF_MEMORY", "NODE_FAIL", "REVOKED"])
def test_job_that_is_over_is_not_cancelled(slurm, tmp_path, state):
    slurm("squeue", json_answer=json.dumps({"jobs": [{**OLD, "user_name": "", "job_state": state}]}))
    record(tmp_path)
    done = cancel(tmp_path, now=False, whole_sweep=False, say=print)
    assert (done.ended, done.asked) == ([], [])


def test_controller_that_does_not_answer_is_asked_no_more(slurm, monkeypatch, tmp_path):
    monkeypatch.setattr("trainer.launch.slurm_commands._ASK_SECONDS", 0.5)
    slurm("squeue", wait=30)
    found = ask_queue(["7"])
    assert found.jobs == ()
    assert "did not answer" in (found.note or "")
    assert len(slurm.calls()) == 2, "--json, and the lines that are quicker"
    record(tmp_path)
    assert "unknown (squeue did not answer" in describe(collect(tmp_path))
    with pytest.raises(TrainerError, match="nothing was cancelled"):
        cancel(tmp_path, now=True, whole_sweep=False, say=print)


def test_controller_that_is_away_is_not_a_forgotten_job(slurm):
    """As 22.05 answers then: --json with exit code 0, no jobs and an error of no meaning."""
    error = {"error_number": -1, "error": "Unspecified error", "source": "slurm_load_jobs"}
    said = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    slurm("squeue", json_answer=json.dumps({"errors": [error], "jobs": []}), code=1, error=said)
    found = ask_queue(["7"])
    assert found.jobs == ()
    assert "Unable to contact slurm controller" in (found.note or "")
    assert [call.split()[0] for call in slurm.calls()] == ["squeue", "squeue"]


def test_job_of_another_user_is_left_alone(slurm, tmp_path):
    slurm("squeue", json_answer=json.dumps({"jobs": [{**OLD, "user_name": "somebody-else"}]}))
    slurm("scancel")
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs.json").write_text('{"jobs": [{"id": "7"}, {"id": "8; id"}]}')
    said: list[str] = []
    done = cancel(tmp_path, now=True, whole_sweep=False, say=said.append)
    assert (done.ended, done.asked, done.foreign) == ([], [], ["7"])
    assert said == ["7: belongs to somebody-else, left alone"]
    assert not [call for call in slurm.calls() if call.startswith("scancel")]


KEYS = st.sampled_from([*OLD, "jobs", "set", "number"])
VALUES = st.none() | st.integers() | st.text(max_size=5)


@settings(deadline=None, max_examples=60)
@given(
    st.recursive(VALUES, lambda below: st.lists(below, max_size=3) | st.dictionaries(KEYS, below, max_size=4))
    | st.fixed_dictionaries(dict.fromkeys(OLD, VALUES))
)
def test_any_json_is_survived(content):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue, "queue_json", lambda _: json.dumps({"jobs": [content]}))
        patch.setattr(queue, "queue_lines", lambda _: "7|RUNNING|None|N/A|N/A||me\n")
        patch.setattr(queue, "show_jobs", lambda _: "")
        patch.setattr(queue, "accounted_jobs", lambda _: "")
        assert [job.state for job in ask_queue(["7"]).jobs][-1:] == ["RUNNING"]


@pytest.mark.parametrize(("text", "numbers"), [
    ("1-3%1", [1, 2, 3]), ("5", [5]), ("1,7,9-10", [1, 7, 9, 10]), ("10-20:5%2", [10, 15, 20]), ("", []),
    ("[2-3]", [2, 3]), ("1,2,...", [1, 2]), ("4294967294", [4294967294]),
])  # fmt: skip
def test_task_lists(text, numbers):
    assert expand_tasks(text) == numbers


def test_a_job_table_and_the_last_error(slurm, tmp_path):
    now = time.time()
    running = {**OLD, "start_time": int(now) - 60, "end_time": int(now) + 7205}
    waiting = {**OLD, "job_id": 8, "job_state": "PENDING", "state_reason": "Dependency", "start_time": 0, "nodes": ""}
    slurm("squeue", json_answer=json.dumps({"jobs": [waiting, running]}))
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs.json").write_text('{"jobs": [{"id": "7"}, {"id": "8"}]}')
    write_status(tmp_path, {"state": "running", "step": 100, "total_steps": 1000, "restarts": 1})
    line = {"step": 100, "loss": 3.0, "tokens_per_second": 1e4, "step_seconds": 10.0, "time_unix": now}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    failure = {
        "class": "hang", "cause": "rank 3 on node7 waits\x1b[31m in all-reduce", "fix": "look at node7", "rank": 3,
        "host": "node7", "step": 90, "time_unix": now - 3600,
    }  # fmt: skip
    (tmp_path / "failure.json").write_text(json.dumps(failure))
    status = collect(tmp_path)
    assert (status.state, status.job_id, status.job_state) == ("running", "7", "RUNNING")
    assert status.finish_unix == pytest.approx(now + 9000, abs=60)
    assert (status.failure.kind, status.failure.rank, status.failure.step) == ("hang", 3, 90)
    text = describe(status)
    assert "100 of 1000 (10.0%), 2h 30m left, done about" in text
    assert "last error  hang: rank 3 on node7 waits [31m in all-reduce (1h 00m ago)" in text
    assert "\x1b" not in text
    rows = [line.split() for line in text.splitlines()[-2:]]
    assert rows[0][:3] == ["7", "RUNNING", "-"]
    assert rows[0][-4:] == ["2h", "00m", "2", "node[1-2]"]
    assert rows[1][:4] == ["8", "PENDING", "Dependency", "-"]
    assert {line.index("state") for line in text.splitlines() if "SLURM job" in line} == {11}
    parsed = json.loads(status.to_json())
    assert [job["id"] for job in parsed["jobs"]] == ["7", "8"]


@pytest.mark.parametrize("junk", ["", "[]", '{"class": 3, "cause": [1]}', "[" * 100_000])
def test_damaged_failure_file_is_passed_over(tmp_path, junk):
    write_status(tmp_path, {"state": "failed"})
    (tmp_path / "failure.json").write_text(junk)
    assert collect(tmp_path).failure is None


def test_only_environment_of_the_cluster_reaches_slurm(slurm, monkeypatch, tmp_path):
    """Variables of a job we run in would steer the new one."""
    (tmp_path / "bin" / "squeue").write_text(f"#!/bin/sh\nenv > {tmp_path}/seen\necho '{{\"jobs\": []}}'\n")
    monkeypatch.setenv("SLURM_NTASKS", "3")
    monkeypatch.setenv("SLURM_CONF", "/etc/x")
    ask_queue(["7"])
    seen = (tmp_path / "seen").read_text()
    assert "SLURM_CONF=/etc/x" in seen
    assert "SLURM_NTASKS" not in seen
    assert os.environ["SLURM_NTASKS"] == "3"
