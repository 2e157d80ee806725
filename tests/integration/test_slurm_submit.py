"""`trainer submit` and `trainer status` as a user runs them, on a real SLURM cluster."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from trainer.config.yaml_text import parse_yaml
from trainer.preflight.data import write_tiny_shard

pytestmark = pytest.mark.slurm
TRAINER = [sys.executable, "-m", "trainer"]
RECIPE = """
run: {name: tiny, directory: runs/tiny, steps: 4}
model: {config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
                 num_attention_heads: 2, num_key_value_heads: 2, vocab_size: 64}}
data: {train: [{path: shard}], sequence_length: 16}
batch: {global_size: 8, micro_size: 1}
launch: {slurm: {nodes: 1, gpus_per_node: 2, time: "00:10:00", signal_seconds: 60}}
"""


@pytest.fixture
def recipe(tmp_path):
    write_tiny_shard(tmp_path / "shard", 2000, vocab_size=64, dtype="uint16", num_tokens=2000)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def test_dry_run_prints_a_script_that_sbatch_takes(slurm_cluster, recipe):
    before = files(recipe.parent)
    arguments = ["recipe.yaml", "optimizer.learning_rate=1e-3", "--nodes", "2", "--gpus-per-node", "4", "--time", "30"]
    done = slurm_cluster.run([*TRAINER, "submit", *arguments, "--dry-run"], cwd=recipe.parent)
    assert done.returncode == 0, done.stderr
    assert files(recipe.parent) == before, "a dry run writes nothing"
    for line in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=30"):
        assert f"#SBATCH {line}\n" in done.stdout
    assert f"trainer train {recipe} optimizer.learning_rate=1e-3 launch.launcher=slurm" in done.stdout
    script = recipe.parent / "dry.sbatch"
    script.write_text(done.stdout)
    tested = slurm_cluster.run(["sbatch", "--test-only", str(script)])
    assert tested.returncode == 0, tested.stderr
    assert "using 8 processors" in tested.stderr


def test_bad_runs_are_refused_before_sbatch(slurm_cluster, recipe):
    """At the size SLURM is asked for: 8 sequences fit 2 ranks, not 3."""
    for arguments, word in (
        (["--gpus-per-node", "3"], "batch.global_size"),
        (["launch.slurm.partition='main; id'"], "launch.slurm.partition"),
        (["--time", "soon"], "launch.slurm.time"),
        (["launch.slurm.partition=nowhere"], "nvalid partition"),
    ):
        command = [*TRAINER, "submit", "recipe.yaml", "run.name=refused", *arguments]
        done = slurm_cluster.run(command, cwd=recipe.parent)
        assert done.returncode == 2, (arguments, done.stdout, done.stderr)
        assert word in done.stderr
        assert "Traceback" not in done.stderr
    assert slurm_cluster.run(["squeue", "-h", "-n", "refused", "-t", "all"]).stdout == ""


@pytest.fixture
def closed(slurm_cluster):
    """A closed partition: jobs wait, so that a test sees the queue; the run itself is another test's business."""
    slurm_cluster.run(["scontrol", "update", "partition=main", "state=down"])
    yield
    slurm_cluster.run(["scancel", "--name=tiny"])
    slurm_cluster.run(["scontrol", "update", "partition=main", "state=up"])


def status_of(cluster, directory: Path) -> dict:
    shown = cluster.run([*TRAINER, "status", str(directory), "--json"])
    assert shown.returncode == 0, shown.stderr
    return json.loads(shown.stdout)


def test_chain_waits_is_shown_and_cancelled(slurm_cluster, closed, recipe):
    run_directory = recipe.parent / "runs" / "tiny"
    (recipe.parent / "site.yaml").write_text("partition: main\ntime: '00:30:00'\nenvironment: {GREETING: a b}\n")
    before = slurm_cluster.run(["sbatch", "--parsable", "--job-name=tiny", "--wrap=true"]).stdout.strip()
    arguments = ["recipe.yaml", "--profile", "site.yaml", "--chain", "3", "--after", before, "--singleton"]
    done = slurm_cluster.run([*TRAINER, "submit", *arguments], cwd=recipe.parent)
    assert done.returncode == 0, done.stderr
    assert "profile: site (site.yaml)" in done.stderr
    jobs = done.stdout.split()
    assert len(jobs) == 3
    script = (run_directory / "slurm" / "submit-0001.sbatch").read_text()
    assert "#SBATCH --time=00:10:00\n" in script, "the recipe wins over the profile"
    assert "export GREETING='a b'\n" in script
    first, second, third = (slurm_cluster.fields(job) for job in jobs)
    assert first["WorkDir"] == str(recipe.parent)
    assert first["Dependency"] == f"afterany:{before}(unfulfilled),singleton(unfulfilled)"
    assert second["Dependency"].startswith(f"afterany:{jobs[0]}(")
    assert third["Dependency"].startswith(f"afterany:{jobs[1]}(")

    status = status_of(slurm_cluster, run_directory)
    assert (status["job_id"], status["job_state"]) == (jobs[0], "PENDING")
    assert [(job["id"], job["state"]) for job in status["jobs"]] == [(job, "PENDING") for job in jobs]
    # SLURM names one of two reasons: which, depends on what its scheduler looked at last.
    reason = status["jobs"][1]["reason"]
    assert reason in ("Dependency", "PartitionDown")
    shown = slurm_cluster.run([*TRAINER, "status", str(run_directory)]).stdout
    assert f"{jobs[1]}" in shown
    assert "Dependency" in shown or "PartitionDown" in shown

    cancelled = slurm_cluster.run([*TRAINER, "cancel", str(run_directory)])
    assert cancelled.stdout.splitlines() == [f"{job}: out of the queue" for job in jobs], cancelled.stderr
    assert [slurm_cluster.state(job) for job in jobs] == ["CANCELLED"] * 3
    again = slurm_cluster.run([*TRAINER, "cancel", str(run_directory)])
    assert (again.returncode, "nothing to cancel" in again.stdout) == (0, True)


def test_sweep_is_an_array_of_runs(slurm_cluster, closed, recipe):
    directory = recipe.parent / "runs" / "tiny"
    axes = ["--sweep", "optimizer.learning_rate=1e-4,3e-4", "--sweep", "batch.micro_size=1,2", "--max-running", "2"]
    done = slurm_cluster.run([*TRAINER, "submit", "recipe.yaml", *axes], cwd=recipe.parent)
    assert done.returncode == 0, done.stderr
    array = done.stdout.strip()
    fields = slurm_cluster.fields(array)
    assert (fields["ArrayTaskId"], fields["ArrayTaskThrottle"]) == ("1-4%2", "2")
    tasks = status_of(slurm_cluster, directory)["tasks"]
    assert [task["values"] for task in tasks] == [
        {"optimizer.learning_rate": rate, "batch.micro_size": size} for rate in (1e-4, 3e-4) for size in (1, 2)
    ]
    assert [(task["job_id"], task["job_state"]) for task in tasks] == [
        (f"{array}_{n}", "PENDING") for n in (1, 2, 3, 4)
    ]
    one = slurm_cluster.run([*TRAINER, "cancel", str(directory / "tiny-0003")])
    assert one.stdout == f"{array}_3: out of the queue\n", one.stderr
    refused = slurm_cluster.run([*TRAINER, "cancel", str(directory)])
    assert (refused.returncode, "--all" in refused.stderr) == (2, True)
    rest = slurm_cluster.run([*TRAINER, "cancel", str(directory), "--all"])
    assert rest.stdout.splitlines() == [f"{array}_{n}: out of the queue" for n in (1, 2, 4)]


def test_bad_sweep_is_refused_with_the_problems_of_all_tasks(slurm_cluster, recipe):
    before = files(recipe.parent)
    axes = ["--sweep", "optimizer.learning_rate=1e-4,-1", "--sweep", "batch.micro_size=3,1"]
    done = slurm_cluster.run([*TRAINER, "submit", "recipe.yaml", *axes], cwd=recipe.parent)
    assert done.returncode == 2
    assert "2 of 4 tasks" in done.stderr
    assert "batch.global_size" in done.stderr
    assert "optimizer.learning_rate = -1" in done.stderr
    assert files(recipe.parent) == before


def test_array_drains_once_the_run_is_done(slurm_cluster, closed, recipe):
    run_directory = recipe.parent / "runs" / "tiny"
    # Ranks that were started all the same would fail: there is no srun.
    arguments = ["recipe.yaml", "--array", "3", "launch.slurm.setup=['srun() { exit 1; }']"]
    done = slurm_cluster.run([*TRAINER, "submit", *arguments], cwd=recipe.parent)
    assert done.returncode == 0, done.stderr
    array = done.stdout.strip()
    (run_directory / "DONE").write_text("{}")
    slurm_cluster.run(["scontrol", "update", "partition=main", "state=up"])
    assert [slurm_cluster.wait(f"{array}_{task}") for task in (1, 2, 3)] == ["COMPLETED"] * 3
    for task in (1, 2, 3):
        assert "has finished: nothing to do" in (run_directory / "logs" / f"slurm-{array}_{task}.out").read_text()
    # Asked for again, a run that was done before goes on to its ranks, which know how many steps are wanted.
    setup = "launch.slurm.setup=['srun() { echo x > runs/tiny/started; sleep 60; }']"
    again = slurm_cluster.run([*TRAINER, "submit", "recipe.yaml", setup], cwd=recipe.parent)
    assert again.returncode == 0, again.stderr
    slurm_cluster.wait_for(run_directory / "started")


@pytest.mark.parametrize("how", [["--chain", "3"], ["--array", "3"]], ids=["chain", "array"])
def test_rest_of_a_chain_ends_with_a_persons_stop(slurm_cluster, closed, recipe, how):
    """The save that was asked for fails: the job stays ended, and those after it start no ranks."""
    run_directory = recipe.parent / "runs" / "tiny"
    # Stands for the ranks: what they write when they accept the stop, then death.
    (recipe.parent / "ranks.sh").write_text(
        "srun() {\n"
        "  echo x >> runs/tiny/started\n"
        """  echo '{"state": "running", "requeue": false, "updated_unix": '"$(date +%s)"'}' > runs/tiny/status.json\n"""
        "  return 137\n"
        "}\n"
    )
    (run_directory / "slurm").mkdir(parents=True)
    (run_directory / "slurm" / "excluded_nodes.json").write_text(
        json.dumps({"nodes": [{"host": "node2", "count": 1, "reason": "failed", "job": "1", "time_unix": time.time()}]})
    )
    arguments = ["recipe.yaml", *how, "launch.slurm.setup=['source ranks.sh']", "launch.slurm.gpus_per_node=0"]
    done = slurm_cluster.run([*TRAINER, "submit", *arguments], cwd=recipe.parent)
    assert done.returncode == 0, done.stderr
    assert "left out, since the run failed on them lately: node2" in done.stderr
    jobs = done.stdout.split()
    if how[0] == "--array":
        jobs = [f"{jobs[0]}_{task}" for task in (1, 2, 3)]
    assert slurm_cluster.fields(jobs[0])["ExcNodeList"] == "node2"
    slurm_cluster.run(["scontrol", "update", "partition=main", "state=up"])
    assert [slurm_cluster.wait(job) for job in jobs] == ["FAILED"] * 3
    assert [slurm_cluster.fields(job)["ExitCode"] for job in jobs] == ["1:0", "93:0", "93:0"]
    assert (run_directory / "started").read_text() == "x\n"
    for job in jobs[1:]:
        log = (run_directory / "logs" / f"slurm-{job}.out").read_text()
        assert "gave up (a person asked the run to stop" in log


def test_running_job_is_asked_to_save_or_ended_now(slurm_cluster, recipe):
    run_directory = recipe.parent / "runs" / "tiny"
    arguments = ["recipe.yaml", "launch.slurm.setup=['touch runs/tiny/here; echo x > runs/tiny/here; exec sleep 60']"]
    job = slurm_cluster.run([*TRAINER, "submit", *arguments], cwd=recipe.parent).stdout.strip()
    slurm_cluster.wait_for(run_directory / "here")
    asked = slurm_cluster.run([*TRAINER, "cancel", str(run_directory)])
    assert asked.stdout.startswith(f"{job}: asked to save and stop"), asked.stderr
    assert json.loads((run_directory / "control.json").read_text())["action"] == "stop"
    assert slurm_cluster.state(job) == "RUNNING"
    status = status_of(slurm_cluster, run_directory)
    assert status["jobs"][0]["nodes"] == "node1"
    assert status["jobs"][0]["restarts"] == 0
    assert status["jobs"][0]["end_unix"] > status["jobs"][0]["start_unix"] > 0
    ended = slurm_cluster.run([*TRAINER, "cancel", str(run_directory), "--now"])
    assert ended.stdout.startswith(f"{job}: ends"), ended.stderr
    assert slurm_cluster.wait(job) == "CANCELLED"
    missing = slurm_cluster.run([*TRAINER, "status", str(recipe.parent / "nothing")])
    assert missing.returncode == 2
    assert "is not a directory" in missing.stderr


def test_probe_writes_a_profile_that_submit_takes(slurm_cluster, recipe, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    places = {"XDG_CONFIG_HOME": str(home / "config"), "HOME": str(home), "SCRATCH": "/proc"}
    done = slurm_cluster.run([*TRAINER, "submit", "--probe"], cwd=recipe.parent, env=places)
    assert done.returncode == 0, done.stderr
    profile = home / "config" / "trainer" / "profiles" / "test.yaml"
    assert profile.stat().st_mode & 0o777 == 0o600
    text = profile.read_text()
    values = parse_yaml(text)
    assert values.pop("time") == "24:00:00"
    assert values == {
        "partition": "main", "gpus_per_node": 4, "gres_style": "gpus-per-node", "cpus_per_task": 2,
        "memory_per_node": "8000M", "network_interface": "eth0",
    }  # fmt: skip
    for fact in (
        "SLURM 2",
        "JobRequeue 1",
        "pmi2",
        "node1",
        str(recipe.parent),
        "KillWait",
        "SLURM_JOB_END_TIME",
    ):
        assert fact in text
    assert not list(recipe.parent.glob(".trainer-probe*"))
    arguments = ["submit", "recipe.yaml", "--profile", "test", "--gpus-per-node", "4", "--dry-run"]
    shown = slurm_cluster.run([*TRAINER, *arguments], cwd=recipe.parent, env=places)
    assert shown.returncode == 0, shown.stderr
    assert "#SBATCH --mem=8000M\n" in shown.stdout
    assert "export GLOO_SOCKET_IFNAME=eth0\n" in shown.stdout
