"""One job of four ranks on two real SLURM nodes, started in every way there is: equal losses, and every way saves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import packages
import pytest
import tiny
from test_slurm_cluster import make_plan, notes, output, submit

pytestmark = pytest.mark.slurm
STEPS = 4
STARTS = {
    "srun": [],
    "torchrun": ["launch.slurm.starter=torchrun"],
    "mpirun": ["launch.slurm.starter=mpirun"],
    "srun-pmix": ["launch.slurm.mpi=pmix"],
}
ROOT_MAY = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@pytest.fixture(scope="module", autouse=True)
def mpi() -> None:
    """Open MPI, and the library that SLURM's pmix plugin opens."""
    present = lambda: bool(shutil.which("orted")) and any(Path("/usr/lib").glob("*/libpmix.so"))  # noqa: E731
    packages.require(["openmpi-bin", "libopenmpi-dev", "libpmix-dev"], present)


@pytest.fixture(scope="module")
def losses(slurm_cluster, tmp_path_factory) -> dict[str, list[tuple[float, float]]]:
    """Train one recipe in every way and return each one's losses and gradient norms."""
    folder = tiny.write_world(tmp_path_factory.mktemp("launchers"))
    tiny.write_recipe(
        folder, run={"steps": STEPS}, checkpoint={"every_steps": STEPS}, evaluation={"every_steps": 10},
        launch={"slurm": {"nodes": 2, "gpus_per_node": 0, "time": "00:10:00"}},
    )  # fmt: skip
    found = {}
    for name, overrides in STARTS.items():
        command = tiny.command("submit", "tiny.yaml", f"run.directory=runs/{name}", *overrides)
        done = slurm_cluster.run(command, cwd=folder, env=ROOT_MAY)
        assert done.returncode == 0, done.stderr
        state = slurm_cluster.wait(done.stdout.split()[0], timeout=240)
        run = folder / "runs" / name
        log = "\n".join(path.read_text()[-3000:] for path in (run / "logs").glob("slurm-*.out"))
        assert state == "COMPLETED", f"{name}: {log}"
        launchers = {"srun-pmix": "slurm", "srun": "slurm", "mpirun": "openmpi"}
        recorded = json.loads((run / "environment.json").read_text())
        assert (recorded["world_size"], recorded["variables"]["TRAINER_LAUNCHER"]) == (4, launchers.get(name, name))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[name] = [(line["loss"], line["grad_norm"]) for line in lines if "kind" not in line]
        hosts = [path.read_text().split(" host ")[1].split()[0] for path in sorted((run / "logs").glob("rank-*.log"))]
        assert hosts == ["node1", "node1", "node2", "node2"], name
    return found


def test_every_start_computes_the_same_bits(losses):
    assert set(losses) == set(STARTS)
    assert len(losses["srun"]) == STEPS
    for name in STARTS:
        assert losses[name] == losses["srun"], name


@pytest.mark.parametrize(
    ("starter", "scancel"),
    [("torchrun", ["-s", "USR1"]), ("mpirun", ["-b", "-s", "USR1"])],
    ids=["torchrun-steps", "mpirun-batch"],
)
def test_every_start_lets_ranks_save_and_go_on(slurm_cluster, tmp_path, starter, scancel):
    """The signals of a time limit reach the ranks behind torchrun's agents and mpirun, which live through them."""
    plan = make_plan(tmp_path, "wait", starter=starter)
    job = submit(slurm_cluster, plan, env=ROOT_MAY)
    for rank in range(4):
        slurm_cluster.wait_for(tmp_path / f"attempt-0-rank-{rank}.json")
    assert slurm_cluster.run(["scancel", *scancel, job]).returncode == 0
    assert slurm_cluster.wait(job, timeout=120) == "COMPLETED", output(plan, job)
    assert [note["received"] for note in notes(tmp_path, 0)] == ["SIGUSR1"] * 4
    assert len(notes(tmp_path, 1)) == 4
    assert f"job {job} requeued" in output(plan, job)
