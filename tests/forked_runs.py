"""Whole training runs for tests, forked from one process that has imported torch (tests/distributed/zygote.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from ranks import TESTS

from trainer.checkpoint import layout
from trainer.checkpoint.reader import CheckpointReader
from trainer.data.shards import ShardWriter

STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Kill:
    """Signal ``victims`` (ranks) ``delay_seconds`` after ``run`` has committed a step beyond ``newer_than``."""

    run: Path
    newer_than: int
    delay_seconds: float
    victims: list[int]
    signal: int = signal.SIGKILL


class Trainer:
    """Runs recipes through forked ranks."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name, documents in (("train", 300), ("valid", 12)):
            with ShardWriter(directory / name, 512, end_of_document_id=0) as writer:
                for number in range(documents):
                    length = 20 + (number * 37) % 150
                    writer.add([1 + (number * 31 + 3 * i) % 511 for i in range(length)] + [0])
                writer.commit()
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "distributed" / "zygote.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=directory,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TRAINER_ALLOW_FAULTS": "1"},
        )  # fmt: skip

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)

    def recipe(self, run: str, /, *, dropout: float = 0.1, **sections: Any) -> Path:
        path = self.directory / f"{run}.yaml"
        config = {
            "model_type": "gpt2", "vocab_size": 512, "n_embd": 48, "n_layer": 2, "n_head": 2, "n_positions": 64,
            "resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout, "bos_token_id": 0, "eos_token_id": 0,
        }  # fmt: skip
        recipe: dict[str, Any] = {
            "run": {"name": "resume", "directory": str(self.directory / run), "seed": 11, "steps": STEPS},
            "model": {"config": config, "dtype": "float32"},
            "data": {
                "train": [{"path": str(self.directory / "train")}],
                "validation": [{"name": "v", "path": str(self.directory / "valid")}],
                "sequence_length": 32,
            },
            "batch": {"global_size": 8, "micro_size": 2},
            "optimizer": {"learning_rate": 3e-3},
            "checkpoint": {"every_steps": 10, "keep_last": 5, "asynchronous": False},
            "evaluation": {"every_steps": 5},
            "telemetry": {"tensorboard": False},
            "resilience": {"watchdog": {"report_seconds": 0}},
            "launch": {"processes": 2},
        }
        for section, values in sections.items():
            recipe[section] = recipe.get(section, {}) | values
        path.write_text(yaml.safe_dump(recipe))
        return path

    def train(
        self, recipe: Path, *overrides: str, world: int = 2, faults: str = "", before: str = "",
        kill: Kill | None = None, grace_seconds: float = 0.0, privileged: bool = True,
        variables: dict[str, str] | None = None,
    ) -> list[int]:  # fmt: skip
        """Run to the end and return the ranks' exit codes; ``grace_seconds`` after one was killed the others are.

        ``install()`` of the module ``before`` is called in each rank first. Ranks that are not ``privileged`` heed the
        modes of files even as root.
        """
        output = recipe.with_suffix(".out")
        job = {
            "argv": ["train", str(recipe), *overrides], "world": world, "output": str(output),
            "env": {"TRAINER_FAULTS": faults, **(variables or {})}, "grace_seconds": grace_seconds,
            "privileged": privileged, "before": before,
            "kill": None if kill is None else asdict(kill) | {"run": str(kill.run)},
        }  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, "the zygote died"
        return json.loads(answer)

    def check(self, codes: list[int], recipe: Path) -> None:
        assert set(codes) == {0}, (codes, recipe.with_suffix(".out").read_text()[-2000:])

    def metrics(self, run: str) -> dict[tuple[int, str], float]:
        lines = [json.loads(line) for line in (self.directory / run / "metrics.jsonl").read_text().splitlines()]
        keys = [(line["step"], line.get("kind", "step")) for line in lines]
        assert len(set(keys)) == len(keys)
        return {key: line.get("loss", line.get("validation_loss")) for key, line in zip(keys, lines, strict=True)}

    def status(self, run: str) -> dict[str, Any]:
        return json.loads((self.directory / run / "status.json").read_text())


def exact_lines(trainer: Trainer, run: str) -> list[dict[str, Any]]:
    """Return everything of the steps that two runs of the same recipe must share to the last bit."""
    return exact_lines_of(trainer.directory / run)


def exact_lines_of(run: Path) -> list[dict[str, Any]]:
    """The same, of a run directory."""
    path = run / "metrics.jsonl"
    lines = [line for line in map(json.loads, path.read_text().splitlines()) if "kind" not in line]
    own = {"time_unix", "memory_bytes", "tokens_per_second", "step_seconds", "data_wait_seconds"}
    own |= {"forward_backward_seconds", "optimizer_seconds"}
    own |= {"slowest_rank_seconds", "median_rank_seconds", "slowest_rank"}
    return [{key: value for key, value in line.items() if key not in own} for line in lines]


def tensors(run: Path, step: int | None = None) -> dict[tuple[str, str], torch.Tensor]:
    """Return every tensor of a run's checkpoint (None: the newest): weights and optimizer state."""
    found = layout.newest(run)
    assert found is not None
    directory = found[1] if step is None else layout.step_directory(run, step)
    reader, manifest = CheckpointReader(directory), layout.read_manifest(directory)
    assert manifest is not None
    held = [(name, key) for name, entry in manifest["tensors"].items() for key in entry["states"]]
    return {(name, key): reader.whole(name, key) for name, key in held}
