"""Runs of the command line that tests share: what a command did, and the curves it left."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tiny

STEPS = 20
MORE_STEPS = 30
NOISE = re.compile(r"warning|deepspeed\]|\[INFO\]|\[W\d|\[rank\d|Traceback|gloo|deprecat|huggingface", re.IGNORECASE)
TIMEOUT = 150
"""Seconds for one command: a run takes about 7 on a quiet machine."""


@dataclass(frozen=True)
class Story:
    """What a command did: how it ended and the run directory it left."""

    done: subprocess.CompletedProcess[str]
    directory: Path

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.directory / "status.json").read_text())

    @property
    def lines(self) -> list[dict[str, Any]]:
        return read_metrics(self.directory)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Return the whole lines of metrics.jsonl; a run that is going on may have written half of its last one."""
    path = directory / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def curve(directory: Path) -> list[tuple[int, float, float]]:
    """Return (step, loss, gradient norm) of every training line."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(directory) if "kind" not in line]


def evaluations(directory: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["validation_loss"]) for line in read_metrics(directory) if "kind" in line]


def write_world(path: Path) -> Path:
    """Fill ``path`` with a recipe of STEPS steps, its shards, other shards and a tokenizer."""
    tiny.write_world(path)
    tiny.write_recipe(path, run={"steps": STEPS}, checkpoint={"every_steps": 5}, evaluation={"every_steps": 10})
    tiny.write_shards(path / "data" / "other", tokens=20 * tiny.TOKENS_PER_STEP + 1, seed=2)
    tiny.write_tokenizer(path / "tokenizer")
    return path


def train(folder: Path, name: str, *overrides: str, prefix: list[str] | None = None) -> Story:
    """Run ``trainer train tiny.yaml`` in ``folder`` into ``runs/NAME``."""
    directory = folder / "runs" / name
    arguments = ["train", "tiny.yaml", f"run.directory='runs/{name}'", *overrides]
    argv = [*prefix, *arguments] if prefix else tiny.command(*arguments)
    return Story(tiny.run(argv, folder, timeout=TIMEOUT), directory)


def run_together(folder: Path, *commands: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """Run commands at the same time: one process alone leaves a core idle."""
    with ThreadPoolExecutor(len(commands)) as pool:
        return list(pool.map(lambda argv: tiny.run(argv, folder, timeout=TIMEOUT), commands))


def damage(checkpoint: Path) -> None:
    """Flip one byte in the middle of a shard."""
    shard = sorted(checkpoint.glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)


class Started:
    """A launcher in the background and its ranks."""

    def __init__(self, folder: Path, name: str, *overrides: str) -> None:
        self.directory = folder / "runs" / name
        self.output = folder / f"{name}.out"
        argv = tiny.command("train", "tiny.yaml", f"run.directory=runs/{name}", *overrides)
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                argv,
                cwd=folder,
                env=tiny.environment(),
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def wait_for_step(self, step: int) -> list[psutil.Process]:
        """Wait until ``step`` is in metrics.jsonl; return the processes below the launcher."""
        deadline = time.monotonic() + TIMEOUT
        while not any(line["step"] >= step for line in read_metrics(self.directory)):
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.005)
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, signum: signal.Signals) -> int:
        self.process.send_signal(signum)
        return self.process.wait(timeout=TIMEOUT)
