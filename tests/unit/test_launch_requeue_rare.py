"""What becomes of a job in rare moments: tasks of arrays, preemption, a stop at the limit, what can't be written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from test_launch_requeue import PLACE, Slurm, failure, settle
from test_launch_slurm import PLAN

from trainer.core.status_file import write_status
from trainer.launch import avoided_nodes, excluded_nodes, job_end, requeue, restart_record, slurm_commands
from trainer.launch.attempt_facts import JobPlace
from trainer.launch.controller import Patience
from trainer.launch.job_end import JobEnd
from trainer.launch.slurm import render

pytestmark = pytest.mark.fast


def test_task_of_an_array_is_never_taken_for_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM gives the last task the id of the array."""
    variables = {"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}
    place = JobPlace.here({**variables, "SLURM_RESTART_COUNT": "1", "SLURM_JOB_NODELIST": "node1"})
    assert (place.job, place.own_id, JobPlace.here({"SLURM_JOB_ID": "17"}).own_id) == ("17", "17_3", "17")
    slurm, asked = Slurm(monkeypatch), list[str]()
    monkeypatch.setattr(job_end, "show_job", lambda job: asked.append(job) or slurm.job)
    assert settle(tmp_path, 1, place)[0] == 1
    assert (asked, slurm.requeued) == (["17_3"], ["17_3"])
    assert restart_record.read(tmp_path)[-1].job == "17"


def test_first_attempt_of_a_sweeps_task_is_recorded(tmp_path: Path) -> None:
    run = tmp_path / "sweep" / "texts-0001"
    assert requeue.begin(run, JobPlace(job="17", restart=0, nodes="node1")) == 0
    assert [one.decision for one in restart_record.read(run)] == ["running"]
    assert run.stat().st_mode & 0o777 == 0o700


def test_starts_that_can_not_be_recorded_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm = Slurm(monkeypatch)
    (tmp_path / "slurm").write_text("in the way")
    codes = list[int]()
    for restart in range(4):
        place = JobPlace(job="17", restart=restart, nodes="node1")
        slurm.job = dataclasses.replace(slurm.job, restarts=restart)
        assert requeue.begin(tmp_path, place) == 0
        assert "this start can't be recorded" in capsys.readouterr().err
        codes.append(settle(tmp_path, 1, place)[0])
    assert (codes, len(slurm.requeued)) == ([1, 1, 1, 93], 3)
    assert requeue.begin(tmp_path, JobPlace(job="17", restart=4, nodes="node1")) == 93, "the batch script was killed"


SHOWN = "JobId=17 JobState=COMPLETING Reason=None Restarts=1 PreemptTime={} StartTime=100 NumNodes=1 Partition=main"


@pytest.mark.parametrize(("time", "preempted"), [("None", False), ("99", False), ("100", True), ("150", True)])
def test_preemption_that_cancels_is_seen(monkeypatch: pytest.MonkeyPatch, time: str, preempted: bool) -> None:
    monkeypatch.setattr(slurm_commands, "_run", lambda *_command, **_variables: SHOWN.format(time))
    assert slurm_commands.show_job("17").preempted == preempted


@pytest.mark.parametrize(
    ("state", "requeued"), [("COMPLETING", ["17"]), ("RUNNING", [])], ids=["no grace time", "grace time"]
)
def test_preempted_job_is_requeued_when_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, requeued: list[str]
) -> None:
    slurm, asked = Slurm(monkeypatch, state=state, preempted=True), list[str]()
    monkeypatch.setattr(requeue, "show_job", lambda job: slurm.job)
    monkeypatch.setattr(requeue, "requeue_job", asked.append)
    requeue.at_limit(tmp_path, PLACE)
    assert asked == requeued


def test_a_persons_stop_holds_at_the_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = Slurm(monkeypatch, state="COMPLETING", reason="TimeLimit")
    monkeypatch.setattr(requeue, "show_job", lambda job: slurm.job)
    monkeypatch.setattr(requeue, "requeue_job", slurm.requeued.append)
    assert requeue.begin(tmp_path, PLACE) == 0
    requeue.at_limit(tmp_path, PLACE)
    assert slurm.requeued == ["17"]
    write_status(tmp_path, {"state": "stopped", "exit_code": 75, "requeue": False})
    assert settle(tmp_path, 75)[0] == 75
    assert slurm.cancelled == ["17"]
    slurm.cancelled.clear()
    place = JobPlace(job="18", restart=1, nodes="node1")
    assert settle(tmp_path, 75, place)[0] == 75
    assert slurm.cancelled == [], "SLURM does not start it again"
    slurm.job = dataclasses.replace(slurm.job, restarts=2)
    assert settle(tmp_path, 75, place)[0] == 75
    assert slurm.cancelled == ["18"], "preempted while it stopped"


def test_a_persons_stop_holds_where_the_batch_host_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = Slurm(monkeypatch, state="COMPLETING", reason="TimeLimit")
    monkeypatch.setattr(requeue, "show_job", lambda job: slurm.job)
    monkeypatch.setattr(requeue, "requeue_job", slurm.requeued.append)
    assert requeue.begin(tmp_path, PLACE) == 0
    write_status(tmp_path, {"state": "running", "requeue": False})
    requeue.at_limit(tmp_path, PLACE)
    assert slurm.requeued == []
    again = dataclasses.replace(PLACE, restart=PLACE.restart + 1)
    assert requeue.begin(tmp_path, again) == 93
    assert "a person asked the run to stop" in restart_record.read(tmp_path)[-1].reason
    assert requeue.begin(tmp_path, again) == 0, "put back into the queue by hand"


@pytest.mark.parametrize("by_slurm", [True, False], ids=["PreemptMode=REQUEUE", "PreemptMode=CANCEL"])
def test_preemption_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], by_slurm: bool
) -> None:
    slurm = Slurm(monkeypatch, state="COMPLETING", preempted=not by_slurm)
    monkeypatch.setattr(requeue, "show_job", lambda job: slurm.job)
    monkeypatch.setattr(requeue, "requeue_job", slurm.requeued.append)
    monkeypatch.setattr(requeue, "nodes_of", lambda names: [])
    for restart in range(6):
        place = dataclasses.replace(PLACE, restart=restart)
        assert requeue.begin(tmp_path, place) == 0
        slurm.job = dataclasses.replace(slurm.job, restarts=restart + by_slurm)
        requeue.at_limit(tmp_path, place)
        if restart % 2:  # else killed before it could say so
            settle(tmp_path, 75, place)
    attempts = restart_record.read(tmp_path)
    assert [one.decision for one in attempts] == ["scheduler"] * 6
    assert restart_record.retries(attempts, "17", 6) == 0
    assert by_slurm == (not slurm.requeued)
    assert "5 times in a row without a new checkpoint" in capsys.readouterr().err


def test_a_new_job_avoids_nodes_that_the_run_failed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [slurm_commands.Node(f"node{number}", "idle", frozenset(), gpus=8) for number in range(1, 5)]
    monkeypatch.setattr(avoided_nodes, "nodes_of", lambda partition: nodes)
    plan = dataclasses.replace(PLAN, run_directory=tmp_path, nodes=2, exclude="node[1]", constraint=None)
    plan = dataclasses.replace(plan, memory_per_node=None, reservation=None, gpus_per_node=8)
    said = list[str]()
    assert avoided_nodes.with_avoided_nodes(plan, said.append) == plan
    excluded_nodes.note_suspects(tmp_path, {"node2": "failed"}, "16")
    excluded_nodes.note_suspects(tmp_path, {"node3": "failed"}, "16")
    script = render(avoided_nodes.with_avoided_nodes(plan, said.append))
    assert "#SBATCH --exclude=node[1],node3\n" in script
    assert "--exclude 'node[1]'" in script, "what the user leaves out is kept apart"
    assert "node3" in said[0]
    assert "node2" in said[1], "too few would remain"
    bound = dataclasses.replace(plan, reservation="r")
    assert avoided_nodes.with_avoided_nodes(bound, said.append) == bound


def test_what_fails_or_stops_before_the_ranks_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm, said = Slurm(monkeypatch), list[str]()
    end = JobEnd(
        tmp_path, PLACE, max_restarts=0, max_excluded_nodes=2, patience=Patience(0.0, said.append), say=said.append
    )
    write_status(tmp_path, {"state": "stopped", "exit_code": 2, "requeue": False})  # another start's
    failure(tmp_path, "node2")
    assert end.settle(75, started=False) == 75
    assert (slurm.requeued, slurm.excluded) == (["17"], [])
    assert said[-1] == "job 17 requeued: asked to stop before the ranks were started"
    assert restart_record.read(tmp_path)[-1].decision == "requeue"
    assert end.settle(1, started=False, cause="sbcast failed (exit 1)") == 1
    assert said[-1].startswith("job 17 not requeued: sbcast failed (exit 1); started again after 0 failures")


def test_job_is_left_nodes_that_it_can_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those too small for it, and none are left out of a job that names its own or has a reservation."""
    shown = "JobId=17 JobState=RUNNING NumNodes=2 ReqNodeList={} {}TRES=cpu=8,mem=1T,node=2,gres/gpu=8,gres/gpu:a=8"
    sizes = (
        "n1|idle|a|600000|gpu:a:4(S:0-1)\nn2|idle|a|600000|gpu:4\nn3|idle|a|600000|gpu:2,gpu:b:2\nn4|idle|a|500|gpu:8"
    )
    answers = [
        shown.format("(null)", ""),
        sizes,
        "NumNodes=2 TRES=mem=1000M TresPerNode=gres:gpu:a:4",
        shown.format("n1", ""),
        shown.format("(null)", "Reservation=r "),
    ]
    monkeypatch.setattr(slurm_commands, "_run", lambda *_command, **_variables: answers.pop(0))
    job, nodes = slurm_commands.show_job("17"), slurm_commands.nodes_of()
    assert [(node.name, node.holds(job)) for node in nodes] == [("n1", True), ("n2", True), ("n3", True), ("n4", False)]
    leave = excluded_nodes.that_leave_room
    assert leave(["n1", "n2"], job, [], nodes) == ["n1"]
    assert leave(["n4", "n1"], job, ["n2"], nodes) == ["n4"], "n4 takes no room"
    per_node = slurm_commands.show_job("17")
    assert (per_node.gpus, per_node.memory_mb) == (4, 500)
    for _ in range(2):
        assert leave(["n1"], slurm_commands.show_job("17"), [], nodes) == []


def test_what_the_user_excludes_stays_excluded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a node that the run has failed on once, long ago."""
    slurm, said = Slurm(monkeypatch, excluded="node2,node3"), list[str]()
    for host in ("node2", "node3"):
        excluded_nodes.note_suspects(tmp_path, {host: "failed"}, "16")
    monkeypatch.setattr(excluded_nodes, "EXCLUDED_SECONDS", -1.0)
    end = JobEnd(
        tmp_path,
        PLACE,
        max_restarts=9,
        max_excluded_nodes=2,
        patience=Patience(0.0, said.append),
        say=said.append,
        exclude="node[2]",
    )
    end.settle(1)
    assert slurm.excluded == ["node2"]
    assert "--controller-seconds 600 --exclude 'node[1-3,7]'" in render(PLAN)
