"""`trainer submit` and `trainer status` as a user runs them, on a real SLURM cluster."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

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
        done = slurm_cluster.run([*TRAINER, "submit", "recipe.yaml", *arguments], cwd=recipe.parent)
        assert done.returncode == 2, (arguments, done.stdout, done.stderr)
        assert word in done.stderr
        assert "Traceback" not in done.stderr
    assert slurm_cluster.run(["squeue", "-h", "-n", "tiny", "-t", "all"]).stdout == ""


def test_submitted_run_is_in_the_queue(slurm_cluster, recipe):
    run_directory = recipe.parent / "runs" / "tiny"
    # A closed partition, so that the test sees the job pending; the run itself is another test's business.
    slurm_cluster.run(["scontrol", "update", "partition=main", "state=down"])
    try:
        done = slurm_cluster.run([*TRAINER, "submit", "recipe.yaml"], cwd=recipe.parent)
        assert done.returncode == 0, done.stderr
        job = done.stdout.strip()
        shown = slurm_cluster.run([*TRAINER, "status", str(run_directory), "--json"])
        assert shown.returncode == 0, shown.stderr
        status = json.loads(shown.stdout)
        assert status["job_id"] == job
        assert status["job_state"] == "PENDING"
        assert slurm_cluster.fields(job)["WorkDir"] == str(recipe.parent)
    finally:
        slurm_cluster.run(["scancel", "--name=tiny"])
        slurm_cluster.run(["scontrol", "update", "partition=main", "state=up"])
    assert slurm_cluster.wait(job) == "CANCELLED"
    missing = slurm_cluster.run([*TRAINER, "status", str(recipe.parent / "nothing")])
    assert missing.returncode == 2
    assert "is not a directory" in missing.stderr
