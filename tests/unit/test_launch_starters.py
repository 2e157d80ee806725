"""The line that starts the ranks, in every form, and torchrun's agent."""

from __future__ import annotations

import dataclasses
import shlex

import pytest
from test_launch_slurm import PLAN

from trainer.core.environ import RankEnvironment
from trainer.launch.slurm import render
from trainer.launch.starters import start_line
from trainer.launch.torchrun import agent_command

pytestmark = pytest.mark.fast
STEP = "srun --nodes=4 --ntasks={} --ntasks-per-node={} --kill-on-bad-exit=1 --wait=60 --cpus-per-task={}"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, STEP.format(32, 8, 12)),
        ({"mpi": "pmix"}, STEP.format(32, 8, 12) + " --mpi=pmix"),
        ({"mpi": "pmi2"}, STEP.format(32, 8, 12) + " --mpi=pmi2"),
        ({"starter": "torchrun"}, STEP.format(4, 1, 96) + " /usr/bin/python3 -m trainer.launch.torchrun 8 --"),
        ({"starter": "mpirun"},
         "mpirun --bind-to none --map-by ppr:8:node -n 32 --mca odls_base_sigkill_timeout 5"),
        ({"starter": "mpiexec"}, "mpiexec -n 32 -ppn 8"),
    ],
)  # fmt: skip
def test_start_lines(changes, expected):
    plan = dataclasses.replace(PLAN, online=True, **changes)
    assert shlex.split(start_line(plan).replace("\\\n", "")) == [*expected.split(), *PLAN.command]
    assert start_line(plan) + " &" in render(plan)
    assert start_line(dataclasses.replace(plan, online=False)).startswith("HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 ")


def test_time_limit_is_told_to_whoever_passes_it_on():
    """The ranks of mpirun on the first node belong to the batch shell, not to a step."""
    signals = dict.fromkeys(("srun", "torchrun"), "#SBATCH --signal=USR1@300")
    signals |= dict.fromkeys(("mpirun", "mpiexec"), "#SBATCH --signal=B:USR1@300")
    for starter, line in signals.items():
        assert line in render(dataclasses.replace(PLAN, starter=starter)).splitlines()


def test_agent_of_torchrun():
    node = RankEnvironment(1, 4, 0, 1, 1, "node1", 20_061, "slurm")
    assert agent_command(node, 8, ["/py", "-m", "trainer", "train", "r.yaml"]) == [
        "/py", "-m", "torch.distributed.run", "--nnodes=4", "--node-rank=1", "--nproc-per-node=8",
        "--rdzv-backend=static", "--master-addr=node1", "--master-port=20061", "--max-restarts=0",
        "-m", "trainer", "train", "r.yaml",
    ]  # fmt: skip
