"""Ranks, batch scripts, signals and requeue on a real SLURM cluster of two nodes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from trainer.launch.slurm import LaunchPlan, render

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).resolve().parents[2]
STAND_IN = ROOT / "tests" / "slurm_cluster" / "stand_in.py"
SHOW_RANK = """
import dataclasses, json, os, socket, sys
from trainer.core.environ import detect
ranks = detect(os.environ)
found = dataclasses.asdict(ranks) if ranks else None
if ranks:
    found["resolved"] = socket.gethostbyname(ranks.master_address)
    found["host"] = socket.gethostname()
sys.stdout.write(json.dumps(found) + "\\n")
"""
ALL_REDUCE = """
import os, sys, torch, torch.distributed as dist
from trainer.core.environ import detect, export
ranks = detect(os.environ)
export(ranks, os.environ)
dist.init_process_group("gloo", init_method="env://")
total = torch.tensor([2.0 ** ranks.rank])
dist.all_reduce(total)
dist.barrier()
sys.stdout.write(f"{ranks.rank} {dist.get_world_size()} {total.item():.0f}\\n")
dist.destroy_process_group()
"""


def make_plan(run_directory: Path, mode: str, **changes) -> LaunchPlan:
    settings = {
        "job_name": "stand-in",
        "nodes": 2,
        "ranks_per_node": 2,
        "time": "5",
        "signal_seconds": 60,
        "command": (sys.executable, str(STAND_IN), str(run_directory), mode),
        "python": sys.executable,
        "working_directory": run_directory,
        "run_directory": run_directory,
    }
    return LaunchPlan(**{**settings, **changes})


def submit(cluster, plan: LaunchPlan, env=None) -> str:
    (plan.run_directory / "logs").mkdir(exist_ok=True)
    script = plan.run_directory / "job.sbatch"
    script.write_text(render(plan))
    done = cluster.run(["sbatch", "--parsable", str(script)], cwd=plan.run_directory, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def notes(run_directory: Path, attempt: int) -> list[dict]:
    paths = sorted(run_directory.glob(f"attempt-{attempt}-rank-*.json"))
    return [json.loads(path.read_text()) for path in paths]


def output(plan: LaunchPlan, job_id: str) -> str:
    return (plan.run_directory / "logs" / f"slurm-{job_id}.out").read_text()


def test_ranks_of_srun_find_their_places(slurm_cluster):
    done = slurm_cluster.run(["srun", "-w", "node[1-2]", "--ntasks-per-node=2", sys.executable, "-c", SHOW_RANK])
    assert done.returncode == 0, done.stderr
    found = sorted((json.loads(line) for line in done.stdout.splitlines()), key=lambda ranks: ranks["rank"])
    places = [(ranks["rank"], ranks["local_rank"], ranks["node_rank"], ranks["host"]) for ranks in found]
    assert places == [(0, 0, 0, "node1"), (1, 1, 0, "node1"), (2, 0, 1, "node2"), (3, 1, 1, "node2")]
    shared = {
        (ranks["world_size"], ranks["local_world_size"], ranks["master_address"], ranks["resolved"], ranks["launcher"])
        for ranks in found
    }
    assert shared == {(4, 2, "node1", "10.77.0.1", "slurm")}
    ports = {ranks["master_port"] for ranks in found}
    assert len(ports) == 1
    assert 20_000 <= ports.pop() < 30_000


def test_uneven_step_inside_a_larger_allocation(slurm_cluster):
    """A step may use fewer tasks than the job; the step's numbers count."""
    command = ["salloc", "-N2", "--ntasks-per-node=3", "srun", "-n3", "--distribution=cyclic", sys.executable, "-c"]
    done = slurm_cluster.run([*command, SHOW_RANK])
    assert done.returncode == 0, done.stderr
    found = sorted((json.loads(line) for line in done.stdout.splitlines()), key=lambda ranks: ranks["rank"])
    places = [(ranks["rank"], ranks["local_rank"], ranks["node_rank"], ranks["local_world_size"]) for ranks in found]
    assert places == [(0, 0, 0, 2), (1, 0, 1, 1), (2, 1, 0, 2)]


def test_shells_of_a_job_are_not_ranks(slurm_cluster, tmp_path):
    """SLURM_PROCID=0 is set in batch and interactive shells too."""
    script = tmp_path / "shell.sbatch"
    script.write_text(f"#!/bin/bash\necho procid=$SLURM_PROCID\n{sys.executable} -c '{SHOW_RANK}'\n")
    answer = tmp_path / "out.txt"
    job = slurm_cluster.run(["sbatch", "--parsable", "-N2", "--ntasks-per-node=2", f"--output={answer}", str(script)])
    assert slurm_cluster.wait(job.stdout.strip()) == "COMPLETED", job.stderr
    assert answer.read_text().split() == ["procid=0", "null"]
    interactive = slurm_cluster.run(["salloc", "-N2", sys.executable, "-c", SHOW_RANK])
    assert interactive.stdout.split() == ["null"]
    pty = ["script", "-qec", f"srun --pty {sys.executable} -c '{SHOW_RANK}'", "/dev/null"]
    # script(1) feeds an end of file to the terminal, which may echo it first.
    assert slurm_cluster.run(pty).stdout.split()[-1].endswith("null")


def test_gloo_over_the_detected_address(slurm_cluster):
    done = slurm_cluster.run(["srun", "-N2", "--ntasks-per-node=2", sys.executable, "-c", ALL_REDUCE], timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"{rank} 4 15" for rank in range(4)]


def test_rendered_script_is_accepted(slurm_cluster, tmp_path):
    """Every option at once, and paths with a space and a percent sign."""
    run_directory = tmp_path / "my run 50%"
    run_directory.mkdir()
    plan = make_plan(
        run_directory,
        "stop",
        gpus_per_node=2,
        time="1-02:03:04",
        partition="main",
        cpus_per_task=2,
        memory_per_node="4G",
        setup=("export GREETING='a b'",),
    )
    script = tmp_path / "job.sbatch"
    script.write_text(render(plan))
    done = slurm_cluster.run(["sbatch", "--test-only", str(script)])
    assert done.returncode == 0, done.stderr
    refused = slurm_cluster.run(["sbatch", "--test-only", "--gpus-per-node=5", str(script)])
    assert refused.returncode != 0


def test_stopped_run_is_requeued_and_finishes(slurm_cluster, tmp_path):
    run_directory = tmp_path / "my run 50%"
    run_directory.mkdir()
    # A submitter that is a rank itself, or exported the address of another run, must not disturb the job.
    leftovers = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    plan = make_plan(run_directory, "stop", setup=("export UNSET_IS_FINE=$NOT_SET",))
    job = submit(slurm_cluster, plan, env=leftovers)
    assert slurm_cluster.wait(job) == "COMPLETED", output(plan, job)
    assert slurm_cluster.fields(job)["Restarts"] == "1"
    for attempt in (0, 1):
        assert [note["rank"] for note in notes(run_directory, attempt)] == [0, 1, 2, 3]
    log = output(plan, job)
    assert f"trainer: job {job} requeued" in log, "the log of the first attempt must survive the requeue"


@pytest.mark.parametrize(
    ("scancel", "received"),
    [(["-s", "USR1"], "SIGUSR1"), (["-b", "-s", "USR2"], "SIGUSR1"), (["-b", "-s", "TERM"], "SIGUSR1")],
    ids=["to-ranks", "to-batch-shell", "term-to-batch-shell"],
)
def test_signal_reaches_every_rank(slurm_cluster, tmp_path, scancel, received):
    """Whichever way SLURM asks, the ranks save, and the job goes on."""
    plan = make_plan(tmp_path, "wait")
    job = submit(slurm_cluster, plan)
    for rank in range(4):
        slurm_cluster.wait_for(tmp_path / f"attempt-0-rank-{rank}.json")
    assert slurm_cluster.run(["scancel", *scancel, job]).returncode == 0
    assert slurm_cluster.wait(job) == "COMPLETED", output(plan, job)
    assert [note["received"] for note in notes(tmp_path, 0)] == [received] * 4
    assert len(notes(tmp_path, 1)) == 4


def test_cancelled_job_saves_and_stays_cancelled(slurm_cluster, tmp_path):
    plan = make_plan(tmp_path, "wait")
    job = submit(slurm_cluster, plan)
    for rank in range(4):
        slurm_cluster.wait_for(tmp_path / f"attempt-0-rank-{rank}.json")
    assert slurm_cluster.run(["scancel", job]).returncode == 0
    assert slurm_cluster.wait(job) == "CANCELLED"
    assert len([note for note in notes(tmp_path, 0) if note["received"]]) == 4, "SIGTERM must not cut the save short"
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "stopped"
    assert "not requeued" in output(plan, job)
    assert notes(tmp_path, 1) == []


def test_restarts_without_progress_are_stopped(slurm_cluster, tmp_path):
    """Each attempt says "requeue me" and has saved nothing; the status.json is an earlier run's."""
    (tmp_path / "status.json").write_text('{"state": "stopped", "exit_code": 75, "updated_unix": 1000.0}')
    plan = make_plan(tmp_path, "stale", nodes=1, ranks_per_node=1)
    job = submit(slurm_cluster, plan)
    assert slurm_cluster.wait(job) == "FAILED"
    fields = slurm_cluster.fields(job)
    assert (fields["ExitCode"], fields["Restarts"]) == ("93:0", "3")
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 93)
    assert "3 restarts in a row without a new checkpoint" in status["reason"]
    attempts = json.loads((tmp_path / "slurm" / "restarts.json").read_text())["attempts"]
    assert [attempt["decision"] for attempt in attempts] == ["requeue"] * 3 + ["stop"]
    log = output(plan, job)
    assert [log.count(f"===== job {job}, restart {number}, nodes node") for number in range(4)] == [1] * 4


def test_submit_and_status(slurm_cluster, tmp_path):
    """The functions behind `trainer submit` and `trainer status`, against the real commands."""
    run_directory = tmp_path / "run"
    code = (
        "import sys; from pathlib import Path\n"
        "from trainer.launch.submit import submit, write_script\n"
        "from trainer.launch.status import collect\nfrom trainer.launch.status_text import describe\n"
        "run = Path(sys.argv[1])\n"
        "print(submit(write_script(run, Path(sys.argv[2]).read_text()), print))\n"
        "print(describe(collect(run)))\n"
    )
    script = tmp_path / "rendered.sbatch"
    script.write_text(render(make_plan(run_directory, "stop", working_directory=tmp_path)))
    done = slurm_cluster.run([sys.executable, "-c", code, str(run_directory), str(script)])
    assert done.returncode == 0, done.stderr
    job, *lines = done.stdout.splitlines()
    assert any(line.split()[:1] == [job] for line in lines), lines
    assert slurm_cluster.wait(job) == "COMPLETED"
    assert json.loads((run_directory / "slurm" / "jobs.json").read_text())["jobs"][0]["id"] == job

    script.write_text(render(make_plan(run_directory, "stop", partition="nowhere")))
    refused = slurm_cluster.run([sys.executable, "-c", code, str(run_directory), str(script)])
    assert refused.returncode != 0
    assert "invalid partition" in refused.stderr.lower()
    assert [path.name for path in (run_directory / "slurm").glob("*.sbatch")] == ["submit-0001.sbatch"]
