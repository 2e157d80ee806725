"""`trainer check --on-node` on two real SLURM nodes: good ones, and what can be wrong with one of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trainer.data.shards import ShardWriter

pytestmark = pytest.mark.slurm
ADDRESS = {"node1": "10.77.0.1", "node2": "10.77.0.2"}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "shard", 64, end_of_document_id=0) as writer:
        for number in range(40):
            writer.add([1 + (number + i) % 63 for i in range(50)] + [0])
        writer.commit()
    path = tmp_path / "recipe.yaml"
    # Generous where the machine is busy; a test that waits for a time limit says a smaller one.
    path.write_text(f"""
run: {{name: tiny, directory: {tmp_path}/run, steps: 4}}
model: {{config: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
                 num_attention_heads: 2, num_key_value_heads: 2, vocab_size: 64}}}}
data: {{train: [{{path: {tmp_path}/shard}}], sequence_length: 16}}
batch: {{global_size: 8, micro_size: 1}}
launch: {{preflight: {{seconds: 120}}}}
""")
    return path


def check(cluster, recipe: Path, *overrides: str, tasks: int = 2, shell: str = "") -> subprocess.CompletedProcess[str]:
    """Run the check as one step; ``shell`` is run by each task before it."""
    command = f"{shell} exec {sys.executable} -m trainer check {recipe} {' '.join(overrides)} --on-node"
    srun = ["srun", "-N2", f"--ntasks-per-node={tasks // 2}", "--kill-on-bad-exit=1", "sh", "-c", command]
    return cluster.run(srun, cwd=recipe.parent, timeout=240)


def failure(recipe: Path) -> dict:
    return json.loads((recipe.parent / "run" / "failure.json").read_text())


@contextmanager
def on_node(cluster, node: str, do: list[str], undo: list[str]) -> Iterator[None]:
    done = cluster.run(do, node=node)
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        cluster.run(undo, node=node)


def test_good_nodes_and_a_slow_one(slurm_cluster, recipe: Path) -> None:
    done = check(slurm_cluster, recipe, tasks=4)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "allocation of 4 ranks: ok" in done.stdout
    for words in ("all 4 ranks on 2 nodes", "shared by 2 nodes", "every one of 2 nodes reaches", "right results",
                  "2 files readable from every node", "compute", "slowest: node"):  # fmt: skip
        assert words in done.stdout
    assert list((recipe.parent / "run").iterdir()) == [], "it leaves nothing behind"

    limit = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "40mbit", "burst", "32kb", "latency", "400ms"]
    with on_node(slurm_cluster, "node2", limit, ["tc", "qdisc", "del", "dev", "eth0", "root"]):
        done = check(slurm_cluster, recipe)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "network" in done.stdout
    assert "FAULT  node2 sends only" in done.stdout
    found = failure(recipe)
    assert (found["class"], found["suspect_hosts"], found["retryable"]) == ("network", ["node2"], True)
    assert found["launch"].startswith("slurm-")


def test_a_job_goes_on_without_the_node_that_does_not_share_the_directory(slurm_cluster, recipe: Path) -> None:
    run = recipe.parent / "run"
    run.mkdir()
    submit = [sys.executable, "-m", "trainer", "submit", str(recipe), "model.dtype=float32", "--nodes", "2"]
    with on_node(slurm_cluster, "node2", ["mount", "-t", "tmpfs", "none", str(run)], ["umount", str(run)]):
        done = slurm_cluster.run([*submit, "--gpus-per-node", "0"], cwd=recipe.parent)
        assert done.returncode == 0, done.stderr
        state = slurm_cluster.wait(done.stdout.split()[0], timeout=280)
    log = "\n".join(path.read_text() for path in (run / "logs").glob("slurm-*.out"))
    assert state == "COMPLETED", log
    assert f"{run} is not shared: node2 does not see what node1 wrote (tmpfs {run} on node2)" in log
    assert slurm_cluster.fields(done.stdout.split()[0])["Restarts"] == "1"
    found = failure(recipe)
    assert (found["class"], found["suspect_hosts"]) == ("disk", ["node2"])
    assert "allocation of 2 ranks: ok" in log, "the second attempt, on the other nodes"
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_another_version_on_a_node(slurm_cluster, recipe: Path) -> None:
    shim = recipe.parent / "shim" / "tokenizers-0.0.1.dist-info"
    shim.mkdir(parents=True)
    (shim / "METADATA").write_text("Metadata-Version: 2.1\nName: tokenizers\nVersion: 0.0.1\n")
    shell = f'[ "$SLURM_NODEID" = 0 ] || export PYTHONPATH={shim.parent}:$PYTHONPATH;'
    done = check(slurm_cluster, recipe, shell=shell)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "WRONG  tokenizers 0.0.1 on rank 1 (node2)" in done.stdout
    assert not (recipe.parent / "run").exists()


def test_nodes_without_a_route_between_them(slurm_cluster, recipe: Path) -> None:
    route = ["ip", "route", "add", "blackhole", f"{ADDRESS['node1']}/32"]
    with on_node(slurm_cluster, "node2", route, ["ip", "route", "del", "blackhole", f"{ADDRESS['node1']}/32"]):
        done = check(slurm_cluster, recipe, "launch.preflight.seconds=20")
    # Not always 1: srun may have killed the far rank, whose code is then the highest.
    assert done.returncode in (1, 143), done.stdout + done.stderr
    assert "rank 1 of 2 did not arrive: no word from node2" in done.stdout
    assert "frame #" not in done.stderr, "torch's own words about the connection help nobody"
    found = failure(recipe)
    assert (found["class"], found["suspect_hosts"]) == ("rendezvous", ["node2"])
