"""What becomes of a job, by what is known at its end. The commands themselves: tests/integration/test_slurm_*.py."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.core.done_file import write_done
from trainer.core.failure_file import reports_directory
from trainer.core.status_file import write_status
from trainer.launch import job_end, requeue, restart_record
from trainer.launch.attempt_facts import JobPlace, own_status
from trainer.launch.controller import Patience
from trainer.launch.decision import Decision, Facts, decide
from trainer.launch.finished import now_by_files
from trainer.launch.job_end import JobEnd
from trainer.launch.restart_record import Attempt
from trainer.launch.slurm_commands import JobFacts, Node, SlurmCommandError, SlurmRefusedError
from trainer.resilience.rank_report import RankReport, write_report

pytestmark = pytest.mark.fast
PLACE = JobPlace(job="17", restart=1, nodes="node[1-2]")


def facts(**changes: Any) -> Facts:
    values: dict[str, Any] = {
        "code": 1, "finished": False, "status_code": None, "wants_requeue": None, "cause": None, "retryable": True,
        "step": 10, "job_state": "RUNNING", "without_progress": 0, "retries": 0, "max_restarts": 100,
    }  # fmt: skip
    return Facts(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "name", "code"),
    [
        ({"finished": True, "code": 134}, "done", 0),
        ({"code": 137, "status_code": 75, "wants_requeue": True}, "requeue", 75),  # launchers change exit codes
        ({"code": 75}, "requeue", 75),  # a status of a trainer that doesn't say `requeue`
        ({"code": 75, "status_code": 75, "wants_requeue": False}, "stop", 75),  # a person's stop
        ({"code": 1, "status_code": 1, "wants_requeue": False}, "stop", 1),  # died after it had accepted that
        ({"code": 1, "without_progress": 3, "preempted": True}, "retry", 1),
        ({"code": 1, "without_progress": 3, "back_already": True, "lost_nodes": ("node2",)}, "stop", 93),
        ({"code": 1, "status_code": 1}, "retry", 1),
        ({"code": 137}, "retry", 1),
        ({"code": 0}, "retry", 1),  # ended early, without a word
        ({"code": 1, "retryable": False}, "stop", 1),
        ({"code": 2}, "stop", 2),
        ({"code": 137, "status_code": 2}, "stop", 2),
        ({"code": 1, "status_code": 93}, "stop", 93),
        ({"code": 1, "retries": 100}, "stop", 1),
        ({"code": 75, "status_code": 75, "retries": 100}, "requeue", 75),  # the budget is for failures
        ({"code": 1, "without_progress": 2}, "retry", 1),
        ({"code": 1, "without_progress": 3}, "stop", 93),
        ({"code": 75, "status_code": 75, "without_progress": 3}, "stop", 93),
        ({"code": 75, "status_code": 75, "job_state": "COMPLETING"}, "stop", 75),  # scancel
        ({"code": 75, "status_code": 75, "job_state": "CANCELLED"}, "stop", 75),
        ({"code": 75, "status_code": 75, "job_state": "COMPLETING", "preempted": True}, "requeue", 75),
        ({"code": 1, "job_state": "COMPLETING", "job_reason": "TimeLimit"}, "retry", 1),
        ({"code": 75, "status_code": 75, "job_state": "PREEMPTED"}, "requeue", 75),
        ({"code": 75, "status_code": 75, "job_state": "COMPLETING", "back_already": True}, "scheduler", 75),
        ({"code": 1, "job_state": "PENDING", "back_already": True, "lost_nodes": ("node2",)}, "retry", 1),
    ],
)
def test_decision(changes: dict[str, Any], name: str, code: int) -> None:
    decision = decide(facts(**changes))
    assert (decision.name, decision.exit_code) == (name, code), decision.reason
    assert decision.reason


def test_reason_names_the_cause() -> None:
    assert "rank 3 on node2 was killed" in decide(facts(cause="rank 3 on node2 was killed")).reason
    stopped = decide(facts(cause="rank 3 on node2 was killed", without_progress=3)).reason
    assert "3 restarts in a row" in stopped
    assert "rank 3 on node2 was killed" in stopped
    assert decide(facts(lost_nodes=("node2",))).reason == "node failure: node2"


def attempt(job: str, restart: int, decision: Any, step: int) -> Attempt:
    return Attempt(job=job, restart=restart, decision=decision, step=step, started_unix=1.0)


def test_restarts_are_counted_back_to_the_last_progress_and_the_last_person(tmp_path: Path) -> None:
    for number, (decision, step) in enumerate(
        [("retry", 10), ("retry", 20), ("scheduler", 20), ("requeue", 20), ("lost", 20)]
    ):
        restart_record.write(tmp_path, attempt("17", number, decision, step))
    read = restart_record.read(tmp_path)
    count = restart_record.restarts_without_progress
    assert count(read, "17", 5, 20) == 3
    assert count(read, "17", 5, 25) == 0
    assert count(read, "18", 0, 20) == 0, "another job was submitted by hand"
    of_chain = [dataclasses.replace(attempt(job, 0, "stop", 20), script="a") for job in ("17", "18", "19")]
    assert count([*of_chain, dataclasses.replace(attempt("20", 0, "running", 20), script="a")], "20", 0, 20) == 3
    assert count([*of_chain, dataclasses.replace(attempt("20", 0, "running", 20), script="b")], "20", 0, 20) == 0
    assert restart_record.retries(read, "17", 5) == 3
    restart_record.write(tmp_path, attempt("17", 5, "stop", 20))
    assert count(restart_record.read(tmp_path), "17", 6, 20) == 0, "scontrol requeue by hand after the stop"
    restart_record.write(tmp_path, attempt("17", 5, "retry", 30))
    read = restart_record.read(tmp_path)
    assert [one.step for one in read] == [10, 20, 20, 20, 20, 30], "one entry a start"
    assert count(read, "17", 6, 30) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"attempts": 1}', '{"attempts": [1, {"job": 1}, {"job": "1"}]}'])
def test_damaged_record_counts_for_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "restarts.json").write_text(text)
    assert restart_record.read(tmp_path) == []
    restart_record.write(tmp_path, attempt("17", 0, "retry", 3))
    assert [one.step for one in restart_record.read(tmp_path)] == [3]


def test_status_of_another_attempt_counts_for_nothing(tmp_path: Path) -> None:
    stopped = {"state": "stopped", "exit_code": 75, "attempt": 4}
    write_status(tmp_path, stopped)
    assert own_status(tmp_path, PLACE, time.time()) is not None
    (tmp_path / "status.json").write_text(json.dumps({**stopped, "updated_unix": time.time() - 60}))
    assert own_status(tmp_path, PLACE, time.time()) is None
    # Facts of the attempt are better than any clock.
    path = tmp_path / "attempts" / "0004" / "environment.json"
    path.parent.mkdir(parents=True)
    for job, restart, own in (("17", "1", True), ("17", "0", False), ("16", "1", False)):
        path.write_text(json.dumps({"variables": {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": restart}}))
        assert (own_status(tmp_path, PLACE, time.time()) is not None) == own
    for text in ("", "[]", "{", "null", '"stopped"'):
        (tmp_path / "status.json").write_text(text)
        assert own_status(tmp_path, PLACE, 0.0) is None


class Clock:
    def __init__(self) -> None:
        self.now, self.slept, self.said = 0.0, list[float](), list[str]()

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def patience(self, seconds: float) -> Patience:
        return Patience(seconds, self.said.append, lambda: self.now, self.sleep)


def test_patience_is_bounded_grows_and_speaks_once() -> None:
    clock, answers = Clock(), iter([SlurmCommandError("no answer"), SlurmRefusedError("busy"), "fine"])

    def call() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    patience = clock.patience(60)
    assert patience.ask(call) == "fine"
    assert clock.slept == [1, 2]
    assert clock.said == ["no answer; trying again for up to 1m 00s"]

    def fail() -> str:
        raise SlurmCommandError("still away")

    with pytest.raises(SlurmCommandError, match="still away"):
        patience.ask(fail)
    assert clock.now <= 60, "one bound for all calls"
    assert len(clock.said) == 1

    def refuse() -> str:
        raise SlurmRefusedError("scontrol refused: Invalid job id specified")

    clock = Clock()
    with pytest.raises(SlurmRefusedError):
        clock.patience(60).ask(refuse)
    assert clock.slept == [], "another try would get the same answer"


class Slurm:
    """SLURM's commands, as job_end sees them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **job: Any) -> None:
        known: dict[str, Any] = {
            "state": "RUNNING",
            "reason": "",
            "restarts": 1,
            "nodes": 2,
            "partition": "main",
            "features": "",
            "excluded": "",
        }
        values: dict[str, Any] = known | job
        self.job = JobFacts(**values)
        self.nodes = {f"node{number}": "idle" for number in range(1, 5)}
        self.requeued, self.excluded, self.cancelled = list[str](), list[str](), list[str]()
        monkeypatch.setattr(job_end, "show_job", lambda job: self.job)
        monkeypatch.setattr(job_end, "requeue_job", self.requeued.append)
        monkeypatch.setattr(job_end, "cancel_jobs", self.cancelled.extend)
        monkeypatch.setattr(job_end, "exclude_nodes", lambda job, hosts: self.excluded.extend(hosts))
        monkeypatch.setattr(job_end, "nodes_of", self.nodes_of)

    def nodes_of(self, *, partition: str | None = None, names: Any = ()) -> list[Node]:
        found = [Node(name, state, frozenset({"gpu"})) for name, state in self.nodes.items()]
        return [node for node in found if not names or node.name in names]


def settle(run: Path, code: int, place: JobPlace = PLACE, maximum: int = 2) -> tuple[int, list[str]]:
    said: list[str] = []
    patience = Patience(0.0, said.append)
    end = JobEnd(run, place, max_restarts=100, max_excluded_nodes=maximum, patience=patience, say=said.append)
    return end.settle(code), said


def failure(run: Path, host: str, launch: str = "slurm-17-1-0") -> None:
    """Leave the report of a rank that has run into a broken GPU of ``host``."""
    directory = reports_directory(run, launch)
    directory.mkdir(parents=True)
    write_report(
        directory,
        RankReport(
            rank=2, world_size=4, node_rank=1, host=host, launch=launch, event="raised", time_unix=time.time(),
            phase="forward", step=12, exception_type="RuntimeError", exception_unix=time.time(),
            exception_message="CUDA error: uncorrectable ECC error encountered",
        ),
    )  # fmt: skip


def test_failed_attempt_is_noted_requeued_and_its_node_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = Slurm(monkeypatch, excluded="node9")
    failure(tmp_path, "node2.cluster.local")
    code, said = settle(tmp_path, 137)
    assert code == 1
    assert slurm.requeued == ["17"]
    assert slurm.excluded == ["node9", "node2"], "with what the user excludes"
    assert said[0] == "left out of the next attempt: node2"
    assert said[1].startswith("job 17 requeued after a failure: rank 2 on node2")
    entry = restart_record.read(tmp_path)[-1]
    assert (entry.job, entry.restart, entry.decision) == ("17", 1, "retry")
    assert "uncorrectable ECC" in entry.reason


def test_exclusions_are_capped_expire_and_leave_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = Slurm(monkeypatch)
    for restart, host in enumerate(["node1", "node2", "node3"]):
        place = JobPlace(job="17", restart=restart, nodes="node[1-4]")
        failure(tmp_path, host, launch=f"slurm-17-{restart}-0")
        slurm.excluded.clear()
        slurm.job = dataclasses.replace(slurm.job, restarts=restart, nodes=1)
        settle(tmp_path, 1, place)
    assert slurm.excluded == ["node3", "node2"], "two at most, the oldest is dropped"
    slurm.job = dataclasses.replace(slurm.job, nodes=3, restarts=0, excluded="node3,node2")
    _, said = settle(tmp_path, 1, JobPlace(job="18", restart=0, nodes="node[1-4]"))
    assert any("not left out, since too few nodes would remain for the job: node2" in line for line in said)
    path = tmp_path / "slurm" / "excluded_nodes.json"
    content = json.loads(path.read_text())
    for node in content["nodes"]:
        node["time_unix"] -= 13 * 3600
    path.write_text(json.dumps(content))
    slurm.excluded.clear()
    slurm.job = dataclasses.replace(slurm.job, restarts=1, excluded="node9,node3")
    settle(tmp_path, 1, JobPlace(job="18", restart=1, nodes="node[1-4]"))
    assert slurm.excluded == ["node9"]


def test_second_job_does_not_take_the_first_ones_status_for_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = Slurm(monkeypatch)
    write_status(tmp_path, {"state": "running", "attempt": 1})
    path = tmp_path / "attempts" / "0001" / "environment.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"variables": {"SLURM_JOB_ID": "16"}}))
    assert settle(tmp_path, 2)[0] == 2
    assert slurm.requeued == []
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "running"


def test_controller_that_is_away_leaves_the_job_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = Slurm(monkeypatch)

    def fail(_job: str) -> None:
        raise SlurmCommandError("scontrol did not answer within 15 s")

    for name in ("requeue_job", "show_job"):
        monkeypatch.setattr(job_end, name, fail)
        write_status(tmp_path, {"state": "stopped", "exit_code": 75})
        code, said = settle(tmp_path, 75)
        assert code == 75
        assert "by hand: scontrol requeue 17" in said[-1]
        assert "did not answer" in said[-1]
    assert slurm.requeued == []


def test_attempt_that_died_without_a_word_is_noted_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(requeue, "nodes_of", lambda names: [Node("node2", "down*", frozenset())])
    write_status(tmp_path, {"state": "running", "attempt": 4})
    for restart in range(4):
        place = JobPlace(job="17", restart=restart, nodes="node[1-2]")
        assert requeue.begin(tmp_path, place) == 0
    assert "node failure: node2" in capsys.readouterr().err
    assert [one.decision for one in restart_record.read(tmp_path)] == ["lost"] * 3 + ["running"]
    assert requeue.begin(tmp_path, JobPlace(job="17", restart=4, nodes="node[1-2]")) == 93
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["exit_code"], status.get("attempt")) == (93, None), "no end of the start before"


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Job 17 of a chain, submitted now, and another one after it."""
    (tmp_path / "slurm").mkdir()
    jobs: list[dict[str, str]] = []

    def submit(job: str, at: float) -> JobPlace:
        script = tmp_path / "slurm" / f"submit-{job}.sbatch"
        script.touch()
        os.utime(script, (at, at))
        jobs.append({"id": job, "script": script.name})
        (tmp_path / "slurm" / "jobs.json").write_text(json.dumps({"jobs": jobs}))
        monkeypatch.setenv("SLURM_JOB_ID", job)
        return JobPlace(job=job, restart=0, nodes="node1")

    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    return submit


def test_finished_run_is_not_started(tmp_path: Path, submitted: Any) -> None:
    """Of a chain, or started again; but a job submitted later looks whether more was asked for."""
    first = submitted("17", time.time() - 60)
    assert requeue.begin(tmp_path, first) == 0
    write_done(tmp_path, step=20, attempt=1, reason=None)
    assert requeue.begin(tmp_path, first) == requeue.EXIT_NOTHING_TO_DO
    assert requeue.begin(tmp_path, submitted("18", time.time() - 60)) == requeue.EXIT_NOTHING_TO_DO
    assert requeue.begin(tmp_path, submitted("19", time.time() + 1)) == 0


def test_rest_of_a_chain_does_not_try_what_was_given_up(
    tmp_path: Path, submitted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_hand, of_chain = submitted("19", time.time() + 1), submitted("18", time.time() - 60)
    ended = attempt("17", 3, "stop", 5)
    restart_record.write(tmp_path, ended)
    assert requeue.begin(tmp_path, of_chain) == 0, "the next job may help"
    # The node's clock may be an hour ahead.
    ended = dataclasses.replace(ended, given_up_unix=now_by_files(tmp_path), time_unix=time.time() + 3600)
    restart_record.write(tmp_path, ended)
    assert requeue.begin(tmp_path, of_chain) == 93
    restart_record.write(tmp_path, dataclasses.replace(attempt("17", 4, "requeue", 5)))
    assert requeue.begin(tmp_path, of_chain) == 0, "put back into the queue by hand"
    restart_record.write(tmp_path, dataclasses.replace(ended, restart=5))
    monkeypatch.setenv("SLURM_JOB_ID", "19")
    assert requeue.begin(tmp_path, by_hand) == 0


@pytest.mark.parametrize(
    ("status", "retryable", "final"),
    [
        ({"state": "stopped", "exit_code": 75, "requeue": False}, True, True),
        ({"state": "running", "requeue": False}, True, True),
        ({"state": "failed", "exit_code": 93}, True, True),
        ({"state": "failed", "exit_code": 2}, True, False),
        ({"state": "running"}, True, False),
        ({"state": "running"}, False, True),
    ],
    ids=["person", "person, and died", "gave up", "refused", "failed", "would fail again"],
)
def test_rest_of_a_chain_ends_with_the_run(
    tmp_path: Path,
    submitted: Any,
    monkeypatch: pytest.MonkeyPatch,
    status: dict[str, Any],
    retryable: bool,
    final: bool,
) -> None:
    Slurm(monkeypatch)
    first, second = submitted("17", time.time() - 60), submitted("18", time.time() - 60)
    assert requeue.begin(tmp_path, first) == 0
    write_status(tmp_path, status)
    (tmp_path / "failure.json").write_text(json.dumps({"retryable": retryable, "time_unix": time.time()}))
    settle(tmp_path, int(status.get("exit_code", 1)), first)
    assert (requeue.begin(tmp_path, second) == 93) == final
    assert requeue.begin(tmp_path, submitted("19", time.time() + 60)) == 0


def test_chain_that_gets_nowhere_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, submitted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the site refuses to requeue, or kills: each job starts once."""
    slurm = Slurm(monkeypatch, restarts=0)
    monkeypatch.setattr(requeue, "nodes_of", lambda names: [])

    def refuse(_job: str) -> None:
        raise SlurmRefusedError("Requested operation is presently disabled")

    monkeypatch.setattr(job_end, "requeue_job", refuse)
    monkeypatch.setattr(requeue, "script_name", lambda *_: "submit-0001.sbatch")
    codes = list[int]()
    for job in ("17", "18", "19", "20"):
        place = submitted(job, time.time() - 60)
        assert requeue.begin(tmp_path, place) == 0
        if job != "18":  # killed
            codes.append(settle(tmp_path, 1, place)[0])
    assert codes == [1, 1, 93]
    assert [one.decision for one in restart_record.read(tmp_path)] == ["stop", "lost", "stop", "stop"]
    assert requeue.begin(tmp_path, submitted("21", time.time() - 60)) == 93
    assert "gave up (3 restarts in a row" in capsys.readouterr().err
    assert slurm.requeued == []


def test_decision_is_only_data() -> None:
    assert Decision("retry", "why", 1).restart
    assert not Decision("scheduler", "why", 1).restart


def test_what_ended_before_its_ranks_started_is_no_end_of_the_start_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the wait in the queue would count as time of that start."""
    Slurm(monkeypatch)
    environment = tmp_path / "attempts" / "0004" / "environment.json"
    environment.parent.mkdir(parents=True)
    environment.write_text(json.dumps({"variables": {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "3"}}))
    for restart in range(4):
        restart_record.write(tmp_path, attempt("17", restart, "retry", 0))
    for restart, said in ((4, None), (3, 4)):  # attempt 4 was of restart 3
        write_status(tmp_path, {"state": "running", "attempt": 4})
        settle(tmp_path, 1, JobPlace(job="17", restart=restart, nodes="node[1-2]"))
        status = json.loads((tmp_path / "status.json").read_text())
        assert (status["state"], status.get("attempt")) == ("failed", said)
