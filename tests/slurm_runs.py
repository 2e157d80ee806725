"""Small training runs as SLURM jobs, and the undisturbed run that their results are compared with."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from forked_runs import Trainer, exact_lines_of

WORLD = 4
"""2 nodes with 2 ranks each."""


def sections(steps: int, time_limit: str = "10", **slurm: Any) -> dict[str, Any]:
    """Return what the runs of this module share, by section of the recipe."""
    slurm = {"nodes": 2, "gpus_per_node": 0, "preflight": False, "time": time_limit, **slurm}
    return {
        "run": {"steps": steps},
        "checkpoint": {"every_steps": 4, "keep_last": 50, "asynchronous": False},
        "schedule": {"name": "constant"},
        "evaluation": {"every_steps": 8},
        "telemetry": {"tensorboard": True},
        "launch": {
            "processes": 2,
            "slurm": {"nodes": 2, "gpus_per_node": 0, "preflight": False, "time": time_limit, **slurm},
        },
    }


def undisturbed(directory: Path, steps: int) -> list[dict[str, Any]]:
    """Return the exact lines of a run of ``steps`` by forked ranks, which leaves its data in ``directory``."""
    with Trainer(directory) as trainer:
        recipe = trainer.recipe("reference", **sections(steps))
        trainer.check(trainer.train(recipe, world=WORLD), recipe)
        return exact_lines_of(directory / "reference")


class SlurmRun:
    """A run directory and the jobs that train in it."""

    def __init__(self, cluster: Any, data: Path, directory: Path, recipe: dict[str, Any]) -> None:
        """Write the recipe: that of `undisturbed`, which left its data in ``data``, for another ``directory``."""
        self.cluster, self.directory = cluster, directory
        content = yaml.safe_load((data / "reference.yaml").read_text())
        for section, values in recipe.items():
            content[section] |= values
        content["run"]["directory"] = str(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        self.recipe = directory.parent / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(content))

    def submit(self, faults: str = "", *overrides: str, **environment: str) -> str:
        """Submit the run and return the job's id; ``faults`` are met by every attempt."""
        variables = {"TRAINER_ALLOW_FAULTS": "1", "TRAINER_FAULTS": faults, **environment}
        command = [sys.executable, "-m", "trainer", "submit", str(self.recipe), *overrides]
        done = self.cluster.run(command, env=variables, cwd=self.recipe.parent)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[0]

    def submit_again(self) -> str:
        """Submit the batch script of the newest job once more."""
        script = max((self.directory / "slurm").glob("submit-*.sbatch"))
        done = self.cluster.run(["sbatch", "--parsable", str(script)], cwd=self.recipe.parent)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def lines(self) -> list[dict[str, Any]]:
        """Return the steps of metrics.jsonl."""
        try:
            text = (self.directory / "metrics.jsonl").read_text()
        except FileNotFoundError:
            return []
        complete = text[: text.rfind("\n") + 1]
        return [line for line in map(json.loads, complete.splitlines()) if "kind" not in line]

    def exact_lines(self) -> list[dict[str, Any]]:
        """Return what must be the same as in the undisturbed run, to the last bit."""
        return exact_lines_of(self.directory)

    @property
    def last_step(self) -> int:
        """Newest step in metrics.jsonl."""
        return max((line["step"] for line in self.lines()), default=0)

    def wait_for_step(self, step: int, timeout: float = 240) -> None:
        """Wait until the run has done ``step``."""
        self.wait_until(lambda: self.last_step >= step, f"step {step}", timeout)

    def wait_until(self, condition: Any, what: str, timeout: float = 240) -> None:
        """Wait until ``condition``."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"no {what} within {timeout} s:\n{self.log()[-6000:]}"
            time.sleep(0.1)

    def json(self, name: str) -> dict[str, Any]:
        """Return a file of the run directory."""
        return json.loads((self.directory / name).read_text())

    def attempts(self) -> list[dict[str, Any]]:
        """Return restarts.json; empty before the first start."""
        path = self.directory / "slurm" / "restarts.json"
        return json.loads(path.read_text())["attempts"] if path.exists() else []

    def attempt(self, job: str, restart: int) -> dict[str, Any]:
        """Return what restarts.json says of a start."""
        found = [entry for entry in self.attempts() if (entry["job"], entry["restart"]) == (job, restart)]
        return found[0] if found else {"decision": "running"}

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.directory / "checkpoints").glob(".step-*"))

    def checkpoint(self) -> int:
        """Return the newest committed step."""
        return max((int(p.name[5:]) for p in (self.directory / "checkpoints").glob("step-*")), default=0)

    def log(self) -> str:
        """Return what SLURM wrote down of all jobs."""
        return "\n".join(path.read_text() for path in sorted((self.directory / "logs").glob("slurm-*.out")))
