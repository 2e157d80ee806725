"""detect() and export(): environments dumped from real launches, and the ways they can be wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.core.environ import (
    RankEnvironment,
    derive_threads,
    detect,
    export,
    gloo_interface,
    host_of_rank,
    threads_are_derived,
)
from trainer.core.errors import RefusedError

pytestmark = pytest.mark.fast

TORCHRUN = {
    "LOCAL_RANK": "1",
    "RANK": "3",
    "GROUP_RANK": "1",
    "ROLE_RANK": "3",
    "ROLE_NAME": "default",
    "LOCAL_WORLD_SIZE": "2",
    "WORLD_SIZE": "4",
    "GROUP_WORLD_SIZE": "2",
    "ROLE_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_RUN_ID": "none",
    "OMP_NUM_THREADS": "1",
}
DEEPSPEED = {
    "CROSS_RANK": "0",
    "CROSS_SIZE": "2",
    "LOCAL_SIZE": "2",
    "LOCAL_RANK": "1",
    "RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
# Slurm 22.05: a task and the batch shell of `sbatch -N2 --ntasks-per-node=2`, and the shell of salloc.
SLURM_SHARED = {
    "SLURM_JOB_ID": "1",
    "SLURM_JOBID": "1",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NODELIST": "node[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_NPROCS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
SLURM_BATCH = {**SLURM_SHARED, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_GTIDS": "0"}
SLURM_TASK = {
    **SLURM_SHARED,
    "SLURM_GTIDS": "2,3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_STEPID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
}
# Slurm 22.05 adds these to a task of srun --mpi=pmix and --mpi=pmi2.
SRUN_PMIX = {
    **SLURM_TASK,
    "PMIX_RANK": "3",
    "PMIX_NAMESPACE": "slurm.pmix.1.0",
    "PMIX_SERVER_URI41": "pmix-server.1;tcp4://x",
}
SRUN_PMI2 = {**SLURM_TASK, "PMI_FD": "11", "PMI_RANK": "3", "PMI_SIZE": "4", "PMI_JOBID": "1.0"}
# mpirun in sbatch starts its daemons by srun: the rank sees the task of the daemon.
OPENMPI_IN_SBATCH = {**SLURM_TASK, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "PMIX_RANK": "1", "OMPI_COMMAND": "x"}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def slurm_port(job: int, step: int = 0) -> int:
    return 20_000 + (job * 61 + step) % 10_000


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PATH": "/bin"}, None),
        (TORCHRUN, RankEnvironment(3, 4, 1, 2, 1, "node1", 29400, "torchrun")),
        (DEEPSPEED, RankEnvironment(1, 4, 1, 2, 0, "127.0.0.1", 29500, "deepspeed")),
        (SLURM_TASK, RankEnvironment(3, 4, 1, 2, 1, "node1", slurm_port(1), "slurm")),
        (SLURM_BATCH, None),
        (SLURM_SHARED, None),
        (OPENMPI, RankEnvironment(1, 2, 1, 2, 0, "", 0, "openmpi")),
        (MPICH, RankEnvironment(1, 2, 1, 2, 0, "", 0, "mpich")),
        # Slurm's own steps: extern, batch, interactive
        *(({**SLURM_TASK, "SLURM_STEP_ID": str(2**32 - number)}, None) for number in (4, 5, 6)),
        ({**SLURM_TASK, "SLURM_STEP_ID": "batch"}, None),
        ({**SLURM_TASK, "SLURM_PTY_PORT": "60284"}, None),
        # the innermost launcher wins: mpirun or torchrun started through srun
        ({**SLURM_TASK, **OPENMPI}, RankEnvironment(1, 2, 1, 2, 0, "", 0, "openmpi")),
        ({**SLURM_TASK, **MPICH}, RankEnvironment(1, 2, 1, 2, 0, "", 0, "mpich")),
        ({**SLURM_TASK, **TORCHRUN, "RANK": "2", "LOCAL_RANK": "0"},
         RankEnvironment(2, 4, 0, 2, 1, "node1", 29400, "torchrun")),
        # srun --mpi=pmi2 sets PMI_RANK as well, and needs no MPI
        ({**SLURM_TASK, "PMI_RANK": "3", "PMI_SIZE": "4"},
         RankEnvironment(3, 4, 1, 2, 1, "node1", slurm_port(1), "slurm")),
        (SRUN_PMIX, RankEnvironment(3, 4, 1, 2, 1, "node1", slurm_port(1), "slurm")),
        (SRUN_PMI2, RankEnvironment(3, 4, 1, 2, 1, "node1", slurm_port(1), "slurm")),
        ({**OPENMPI_IN_SBATCH, **OPENMPI}, RankEnvironment(1, 2, 1, 2, 0, "", 0, "openmpi")),
        ({**SLURM_TASK, "MASTER_PORT": "4000", "MASTER_ADDR": "10.0.0.1"},
         RankEnvironment(3, 4, 1, 2, 1, "10.0.0.1", 4000, "slurm")),
        ({**OPENMPI, "MASTER_ADDR": "head", "MASTER_PORT": "4000"},
         RankEnvironment(1, 2, 1, 2, 0, "head", 4000, "openmpi")),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
         RankEnvironment(0, 1, 0, 1, 0, "h", 1, "environment")),
    ],
)  # fmt: skip
def test_detect(environment, expected):
    assert detect(environment) == expected


def test_mpi_asks_for_discovery_unless_it_was_given_an_address():
    given_address = {**OPENMPI, "MASTER_ADDR": "head", "MASTER_PORT": "4000"}
    bare = {"PMI_RANK": "0", "PMI_SIZE": "2", "MASTER_ADDR": "head", "MASTER_PORT": "4000"}
    needs = [detect(variables) for variables in (OPENMPI, given_address, bare)]
    assert [found.needs_discovery for found in needs if found] == [True, False, True]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"WORLD_SIZE": None}, ["WORLD_SIZE"]),
        ({"WORLD_SIZE": None, "MASTER_ADDR": None, "MASTER_PORT": "x"}, ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]),
        ({"RANK": "4"}, ["RANK = 4", "WORLD_SIZE = 4"]),
        ({"RANK": "-1"}, ["RANK"]),
        ({"RANK": "1_0"}, ["RANK"]),
        ({"RANK": ""}, ["RANK"]),
        ({"RANK": "two", "WORLD_SIZE": "4.0"}, ["RANK", "WORLD_SIZE"]),
        ({"RANK": None}, ["WORLD_SIZE", "LOCAL_RANK"]),
        ({"LOCAL_RANK": None}, ["LOCAL_RANK"]),
        ({"LOCAL_RANK": "2"}, ["LOCAL_RANK = 2"]),
        ({"LOCAL_WORLD_SIZE": None}, ["LOCAL_WORLD_SIZE"]),
        ({"LOCAL_WORLD_SIZE": "8"}, ["LOCAL_WORLD_SIZE = 8"]),
        ({"MASTER_PORT": "70000"}, ["MASTER_PORT"]),
    ],
)
def test_broken_rank_variables_are_named(changes, named):
    environment = {name: value for name, value in {**TORCHRUN, **changes}.items() if value is not None}
    with pytest.raises(RefusedError) as error:
        detect(environment)
    for text in named:
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"SLURM_PROCID": "4"}, "SLURM_PROCID"),
        ({"SLURM_LOCALID": "2"}, "SLURM_LOCALID"),
        ({"SLURM_NODEID": "2"}, "SLURM_NODEID"),
        ({"SLURM_LOCALID": None}, "SLURM_LOCALID"),
        ({"SLURM_STEP_NUM_TASKS": "5"}, "adds up to 4"),
        ({"SLURM_STEP_NODELIST": "node[1-"}, "brackets"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x"}, "SLURM_STEP_TASKS_PER_NODE"),
        ({"MASTER_ADDR": "localhost"}, "2 nodes"),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node1",
          "MASTER_PORT": "29500"}, "contradicts SLURM_PROCID = 3"),
    ],
)  # fmt: skip
def test_broken_slurm_variables_are_named(changes, named):
    environment = {name: value for name, value in {**SLURM_TASK, **changes}.items() if value is not None}
    with pytest.raises(RefusedError, match=named.replace("[", r"\[")):
        detect(environment)


@given(job=st.integers(1, 2**31), step=st.integers(0, 10_000), restarts=st.integers(0, 100))
def test_slurm_port_is_in_range_and_differs_between_neighbours(job, step, restarts):
    def port(job: int, step: int, restarts: int) -> int:
        changes = {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step), "SLURM_RESTART_COUNT": str(restarts)}
        found = detect({**SLURM_TASK, **changes})
        assert found is not None
        return found.master_port

    mine = port(job, step, restarts)
    assert 20_000 <= mine < 30_000
    assert len({mine, port(job + 1, step, restarts), port(job, step + 1, restarts), port(job, step, restarts + 1)}) == 4


@given(st.data())
def test_export_round_trip(data):
    world = data.draw(st.integers(1, 64))
    rank = data.draw(st.integers(0, world - 1))
    local_world = data.draw(st.integers(1, world))
    local = data.draw(st.integers(0, local_world - 1))
    launcher = data.draw(st.sampled_from(["local", "ssh", "torchrun", "deepspeed", "environment", "slurm", "openmpi"]))
    ranks = RankEnvironment(rank, world, local, local_world, data.draw(st.integers(0, 63)), "host", 20_000, launcher)
    environment: dict[str, str] = {}
    export(ranks, environment)
    assert detect(environment) == ranks
    assert environment["LOCAL_SIZE"] == str(local_world)
    assert int(environment["OMP_NUM_THREADS"]) >= 1


def test_export_keeps_the_users_threads():
    environment = {"OMP_NUM_THREADS": "3"}
    export(RankEnvironment(0, 1, 0, 1, 0, "127.0.0.1", 20_000, "local"), environment)
    assert environment["OMP_NUM_THREADS"] == "3"


def test_derived_threads_are_told_from_the_users():
    derived: dict[str, str] = {}
    derive_threads(derived, 1)
    derive_threads(derived, 1000)
    assert threads_are_derived(derived)
    assert int(derived["OMP_NUM_THREADS"]) >= 1
    given = {"OMP_NUM_THREADS": "3"}
    derive_threads(given, 1)
    assert not threads_are_derived(given)


@pytest.mark.parametrize(
    ("changes", "hosts"),
    [
        ({}, ["node1", "node1", "node2", "node2", None]),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,3"}, ["node1", "node2", "node2", "node2", None]),
        ({"SLURM_DISTRIBUTION": "cyclic"}, [None] * 5),
        ({"TRAINER_LAUNCHER": "torchrun"}, [None] * 5),
        ({"SLURM_STEP_NODELIST": "node["}, [None] * 5),
    ],
)
def test_host_of_another_rank(changes, hosts):
    environment = {**SLURM_TASK, "TRAINER_LAUNCHER": "slurm", **changes}
    assert [host_of_rank(environment, rank) for rank in range(5)] == hosts


def test_orphan_kills_itself_at_the_start():
    """The launcher died before the rank could ask the kernel to die with it."""
    code = "import os\nfrom trainer.core.environ import die_with_parent\ndie_with_parent(os.environ)\nprint('alive')"
    environment = {**os.environ, "TRAINER_LAUNCHER": "local", "TRAINER_LAUNCHER_PID": str(os.getpid() + 1)}
    orphan = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert (orphan.returncode, orphan.stdout) == (-9, b"")
    environment["TRAINER_LAUNCHER_PID"] = str(os.getpid())
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert (child.returncode, child.stdout) == (0, b"alive\n")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"NCCL_SOCKET_IFNAME": "ib"}, "ib0"),
        ({"NCCL_SOCKET_IFNAME": "=ib"}, None),
        ({"NCCL_SOCKET_IFNAME": "=ib1"}, "ib1"),
        ({"NCCL_SOCKET_IFNAME": "bond,eth"}, "eth0"),
        ({"NCCL_SOCKET_IFNAME": "^docker,lo"}, None),
        ({"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "eth0"}, None),
    ],
)
def test_gloo_follows_what_nccl_was_told(variables, expected):
    assert gloo_interface(variables, ["lo", "eth0", "ib0", "ib1"]) == expected
