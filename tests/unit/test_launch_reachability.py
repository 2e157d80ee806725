"""Whether hosts reach each other, over real sockets."""

from __future__ import annotations

import socket
import time

import pytest

from trainer.core.environ import RankEnvironment
from trainer.core.failure_file import launch_name, read_failure, write_failure
from trainer.launch import reachability
from trainer.launch.attempt_facts import JobPlace
from trainer.launch.failure import hosts_of_ranks
from trainer.launch.rank_examiner import oom_kills
from trainer.launch.reachability import MOST_ASKED, Listener, own_address, unreachable, whom_to_ask

pytestmark = pytest.mark.fast


def test_who_answers_is_reachable() -> None:
    listener = Listener()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, but nobody listens
        addresses = {"a": f"127.0.0.1:{listener.port}", "b": f"127.0.0.1:{closed.getsockname()[1]}", "c": "nonsense"}
        assert unreachable(addresses, time.monotonic() + 0.5) == ["b"]
    listener.close()


def test_names_that_do_not_resolve_cost_the_time_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: object, **__: object) -> None:
        time.sleep(4)
        raise OSError("Name or service not known")

    monkeypatch.setattr(reachability, "_CONNECT_SECONDS", 0.3)
    monkeypatch.setattr(socket, "create_connection", resolve)
    began = time.monotonic()
    assert len(unreachable({str(number): "lost:1" for number in range(8)}, began + 0.2)) == 8
    assert time.monotonic() - began < 2


def test_who_is_asked_stays_few() -> None:
    assert whom_to_ask(1, [0, 1, 2]) == [0, 2]
    asked = whom_to_ask(5, list(range(1000)))
    assert {4, 6, 1000 - 251 + 0} & set(asked) >= {4, 6}
    assert len(asked) <= MOST_ASKED
    assert 5 not in asked


def test_the_address_is_that_of_the_named_interface() -> None:
    assert own_address({"GLOO_SOCKET_IFNAME": "lo"}, "127.0.0.1") == "127.0.0.1"
    assert own_address({"NCCL_SOCKET_IFNAME": "=lo"}, "10.0.0.1") == "127.0.0.1"
    assert own_address({}, "127.0.0.1") == socket.gethostname()


def test_launches_have_names_of_their_own() -> None:
    local = RankEnvironment(0, 2, 0, 2, 0, "127.0.0.1", 2500, "local")
    assert launch_name(local, {}) == "127.0.0.1-2500"
    slurm = RankEnvironment(3, 4, 1, 2, 1, "node1", 2500, "slurm")
    job = {"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "2"}
    assert launch_name(slurm, job) == "slurm-17-2-0"
    odd = RankEnvironment(0, 2, 0, 2, 0, "fe80::1/../x", 1, "environment")
    assert "/" not in launch_name(odd, {})
    assert launch_name(odd, {}) != launch_name(RankEnvironment(0, 2, 0, 2, 0, "fe80__1_.._x", 1, "environment"), {})


def test_slurm_says_where_ranks_are() -> None:
    ranks = RankEnvironment(0, 3, 0, 2, 0, "node1", 1, "slurm")
    said = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2,1"}
    assert hosts_of_ranks(ranks, said) == {0: "node1", 1: "node1", 2: "node2"}
    assert hosts_of_ranks(ranks, {}) == {}
    for distribution, known in (("block:cyclic", True), ("cyclic", False), ("plane=2", False), ("arbitrary", False)):
        assert bool(hosts_of_ranks(ranks, said | {"SLURM_DISTRIBUTION": distribution})) is known
        job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_TASKS_PER_NODE": "2,1", "SLURM_DISTRIBUTION": distribution}
        assert bool(JobPlace.here(job).hosts_of_ranks()) is known


def test_kills_for_want_of_memory_are_counted(tmp_path) -> None:
    (tmp_path / "fs" / "job").mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/job\n")
    (tmp_path / "fs" / "job" / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    assert oom_kills(tmp_path / "cgroup", tmp_path / "fs") == 2
    assert oom_kills(tmp_path / "none", tmp_path) >= 0  # the host's own count


def test_failure_json_is_read_for_its_launch(tmp_path) -> None:
    assert read_failure(tmp_path) is None
    write_failure(tmp_path, {"version": 1, "launch": "one", "cause": "c"})
    assert read_failure(tmp_path) == read_failure(tmp_path, "one") == {"version": 1, "launch": "one", "cause": "c"}
    assert read_failure(tmp_path, "two") is None
    (tmp_path / "failure.json").write_text("[")
    assert read_failure(tmp_path) is None
