"""Whole training runs for tests, forked from one process that has imported torch (tests/distributed/zygote.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from ranks import TESTS

from trainer.data.shards import ShardWriter

STEPS = 20


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

    def recipe(self, run: str, *, dropout: float = 0.1, **sections: Any) -> Path:
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
            "launch": {"processes": 2},
        }
        for section, values in sections.items():
            recipe[section] = recipe.get(section, {}) | values
        path.write_text(yaml.safe_dump(recipe))
        return path

    def train(self, recipe: Path, *overrides: str, world: int = 2, faults: str = "") -> list[int]:
        output = recipe.with_suffix(".out")
        job = {
            "argv": ["train", str(recipe), *overrides], "world": world, "output": str(output),
            "env": {"TRAINER_FAULTS": faults},
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
