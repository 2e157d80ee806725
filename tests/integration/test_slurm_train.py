"""The recipe a laptop runs, through `trainer submit`, on two real SLURM nodes; killed, resubmitted, read back."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.data.shards import ShardWriter

pytestmark = pytest.mark.slurm
STEPS = 16
SECRETS = {
    "HF_TOKEN": "hf_PLANTEDplantedPLANTEDplanted",
    "WANDB_API_KEY": "0123plantedplanted4567planted89",
    "MY_SERVICE_TOKEN": "planted-in-the-submitting-shell",
}
"""In the shell that submits, and so in the environment of every rank."""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for name, documents in (("train", 200), ("valid", 10)):
        with ShardWriter(tmp_path / name, 256, end_of_document_id=0) as writer:
            for number in range(documents):
                writer.add([1 + (number * 31 + 3 * i) % 255 for i in range(60)] + [0])
            writer.commit()
    path = tmp_path / "recipe.yaml"
    config = {
        "model_type": "llama", "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    path.write_text(
        yaml.safe_dump(
            {
                "run": {"name": "cluster", "directory": str(tmp_path / "run"), "steps": STEPS},
                "model": {"config": config, "dtype": "float32"},
                "data": {
                    "train": [{"path": str(tmp_path / "train")}],
                    "validation": [{"name": "v", "path": str(tmp_path / "valid")}],
                    "sequence_length": 32,
                },
                "batch": {"global_size": 8, "micro_size": 2},
                "deepspeed": {"base": "zero2"},
                "checkpoint": {"every_steps": 5},
                "evaluation": {"every_steps": 8},
                "launch": {"processes": 2, "slurm": {"time": "00:10:00"}},
            }
        )
    )
    return path


def test_two_nodes_train_are_killed_and_go_on(slurm_cluster, recipe: Path) -> None:
    run = recipe.parent / "run"
    submit = [sys.executable, "-m", "trainer", "submit", str(recipe), "--nodes", "2", "--gpus-per-node", "0"]

    secret = recipe.parent / "secret"
    secret.write_text("planted-in-a-file\n")
    profile = recipe.parent / "site.yaml"
    profile.write_text(
        f"{{setup: ['export FROM_FILE_TOKEN=\"$(cat {secret})\"'], environment: {{GREETING: it works}}}}"
    )
    submit += ["--profile", str(profile)]

    def job(*overrides: str, **environment: str) -> str:
        done = slurm_cluster.run([*submit, *overrides], env={**SECRETS, **environment}, cwd=recipe.parent)
        assert done.returncode == 0, done.stderr
        return slurm_cluster.wait(done.stdout.split()[0], timeout=240)

    log = lambda: "\n".join(path.read_text()[-20_000:] for path in (run / "logs").glob("slurm-*.out"))  # noqa: E731
    faults = {"TRAINER_ALLOW_FAULTS": "1", "TRAINER_FAULTS": "train.step:3:13:kill"}
    assert job("launch.slurm.preflight=false", "launch.slurm.max_restarts=0", **faults) == "FAILED", log()
    assert len(list((run / "logs").glob("rank-*.log"))) == 4
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == ["step-00000005", "step-00000010"]

    assert job() == "COMPLETED", log()
    assert "allocation of 4 ranks: ok" in log(), "two nodes are checked before they train"
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["resumed_step"], status["restarts"]) == ("finished", STEPS, 10, 1)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["world_size"] == 4
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "kind" not in line] == list(range(1, STEPS + 1))

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    losses = events.Scalars("train/loss")
    assert [point.step for point in losses] == list(range(1, STEPS + 1))
    assert [point.value for point in losses] == pytest.approx([line["loss"] for line in lines if "kind" not in line])
    assert [point.step for point in events.Scalars("validation/v/loss")] == [0, 8, 16]
    tags = events.Tags()["scalars"]
    for tag in ("optimizer/learning_rate", "optimizer/gradient_norm", "progress/tokens", "throughput/tokens_per_second",
                "time/step_seconds", "time/data_wait_seconds", "time/forward_backward_seconds", "memory/peak_bytes",
                "validation/v/perplexity"):  # fmt: skip
        assert tag in tags

    files = [path for path in run.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix in (".out", ".log", ".sbatch")]) >= 8
    for secret in (*SECRETS.values(), "planted-in-a-file"):
        assert [path for path in files if secret.encode() in path.read_bytes()] == []

    shown = slurm_cluster.run([sys.executable, "-m", "trainer", "status", str(run), "--json"])
    assert json.loads(shown.stdout)["state"] == "finished"
