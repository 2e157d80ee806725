"""Hostfiles, their filters, and what goes to each host."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config.hostfile import Host, hosts_of, parse_hostfile
from trainer.config.launch import LaunchConfig
from trainer.core.errors import RecipeError
from trainer.launch.ssh import plan_tasks

pytestmark = pytest.mark.fast
TEXT = "# two boxes\nworker-1 slots=4\n\nme@worker-2.cluster   slots=2 # smaller\n"


def left(tmp_path: Path, **filters: str) -> list[tuple[str, tuple[int, ...], bool]]:
    path = tmp_path / "hosts"
    path.write_text(TEXT)
    hosts = hosts_of(LaunchConfig(launcher="ssh", hostfile=str(path), **filters))
    return [(host.name, host.slots, host.whole) for host in hosts]


def test_hostfile_and_filters(tmp_path):
    first, second = ("worker-1", (0, 1, 2, 3), True), ("me@worker-2.cluster", (0, 1), True)
    assert left(tmp_path) == [first, second]
    assert left(tmp_path, include="worker-2.cluster") == [second]
    assert left(tmp_path, include="worker-2.cluster:1@worker-1:2,0") == [
        ("worker-1", (0, 2), False), ("me@worker-2.cluster", (1,), False),
    ]  # fmt: skip
    assert left(tmp_path, exclude="worker-1:0") == [("worker-1", (1, 2, 3), False), second]
    assert left(tmp_path, exclude="worker-1") == [second]


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        ({"include": "worker-3"}, "launch.include = 'worker-3': is no host"),
        ({"exclude": "worker-1:4"}, "has not got (0-3)"),
        ({"include": "worker-1", "exclude": "worker-1"}, "can't be given beside"),
        ({"exclude": "worker-1@worker-2.cluster"}, "names no host that is left"),
        ({"include": "worker-1; rm -rf /"}, "is no host"),
    ],
)
def test_refused_filters(tmp_path, filters, words):
    with pytest.raises(RecipeError) as error:
        left(tmp_path, **filters)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "line", ["worker", "a slots=0", "-oProxyCommand=x slots=1", "a slots=1 b", "$(x) slots=1", "a:b slots=2"]
)
def test_refused_lines(line):
    hosts, problems = parse_hostfile(f"ok slots=1\n{line}\n")
    assert [host.name for host in hosts] == ["ok"]
    assert [problem.key for problem in problems] == ["launch.hostfile: line 2"]
    assert parse_hostfile("a slots=1\na slots=2\n")[1][0].rule == "names a again"


def test_what_a_host_is_told():
    hosts = [Host("me@one", (0, 1)), Host("two", (3,), whole=False)]
    environment = {"NCCL_DEBUG": "INFO", "HF_TOKEN": "hf_secret", "HF_HOME": "/cache", "HOME": "/root", "RANK": "7",
                   "OMP_NUM_THREADS": "4", "TRAINER_THREADS": "derived", "AWS_SECRET_ACCESS_KEY": "x",
                   "CUDA_VISIBLE_DEVICES": "0"}  # fmt: skip
    one, two = plan_tasks(hosts, ["python", "-m", "trainer"], environment, "/work", 20_001)
    assert one["environment"] == {"NCCL_DEBUG": "INFO", "HF_HOME": "/cache"}
    assert two["environment"] == {"NCCL_DEBUG": "INFO", "HF_HOME": "/cache", "CUDA_VISIBLE_DEVICES": "3"}
    places = [
        [task[key] for key in ("first_rank", "ranks", "node_rank", "world_size", "address")] for task in (one, two)
    ]
    assert places == [[0, 2, 0, 3, "one"], [2, 1, 1, 3, "one"]]
    assert "secret" not in json.dumps([one, two])


RUN = """
import sys
from trainer.config.hostfile import Host
from trainer.launch.ssh import run_hosts
sys.exit(run_hosts([Host("here", (0,))], [sys.executable, "-c", sys.argv[1]]))
"""
RANK = """
import os, signal, sys, time
seen = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, frame: seen.append(signal.Signals(number).name))
print("ready", flush=True)
while not seen:
    time.sleep(0.01)
print("saved after", *seen, flush=True)
sys.exit(75)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1])
def test_every_stop_signal_reaches_ranks_elsewhere(tmp_path: Path, signum: signal.Signals) -> None:
    stand_in = tmp_path / "ssh"
    stand_in.write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift 2\nexec sh -c "$*"\n')
    stand_in.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    launched = subprocess.Popen(
        [sys.executable, "-c", RUN, RANK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    try:
        assert launched.stdout is not None
        assert launched.stdout.readline() == "ready\n"
        launched.send_signal(signum)
        said, errors = launched.communicate(timeout=20)
        assert (launched.returncode, said) == (75, f"saved after {signum.name}\n"), errors
    finally:
        launched.kill()
