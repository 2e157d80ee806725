"""Kill a run at random moments until it has finished in spite of it; compare it with an undisturbed one.

usage: kill_sweep.py --seed N [--kills 12]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tiny import write_recipe, write_world


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "kind" not in line}


def start(recipe: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "trainer", "train", str(recipe)]
    return subprocess.Popen(
        command, cwd=recipe.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def ranks_of(launcher: int) -> list[int]:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--kills", type=int, default=12)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    directory = Path(tempfile.mkdtemp(prefix="kill-sweep-"))
    base = draw.choice(["zero1", "zero2", "zero3"])
    write_world(directory)

    def recipe_of(name: str) -> Path:
        return write_recipe(
            directory, f"{name}.yaml", run={"directory": name, "steps": 400}, checkpoint={"every_steps": 5},
            deepspeed={"base": base}, launch={"processes": 2},
        )  # fmt: skip

    assert start(recipe_of("straight")).wait(600) == 0
    killed = recipe_of("killed")
    run = directory / "killed"
    kills = 0
    while True:
        process = start(killed)
        deadline = time.monotonic() + draw.uniform(6, 14)
        while process.poll() is None and (kills >= arguments.kills or time.monotonic() < deadline):
            time.sleep(0.02)
        if process.poll() is not None:
            break
        victims = ranks_of(process.pid)
        victim = draw.choice([*victims, process.pid]) if victims else process.pid
        os.kill(victim, signal.SIGKILL)
        process.wait(60)
        kills += 1
        print(f"kill {kills}: pid {victim} ({'launcher' if victim == process.pid else 'a rank'})", flush=True)
        time.sleep(1)
    assert process.returncode == 0, process.returncode
    assert losses(run) == losses(directory / "straight"), "losses differ"
    status = json.loads((run / "status.json").read_text())
    print(f"seed {arguments.seed}: {kills} kills, {status['restarts']} restarts, {base}: identical")


if __name__ == "__main__":
    main()
