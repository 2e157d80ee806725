"""Kill a run with SIGKILL at random moments, restart it at other world sizes: it must see the undisturbed batches.

usage: kill_data_sweep.py --seed N [--kills 10]

Losses may differ in their last bits between world sizes; what was read may not. Every step's ``batch_hash`` is compared
with that of an undisturbed run and with what `trainer data which` computes.
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

STEPS = 300
WORLD_SIZES = (2, 1, 4)


def hashes(run: Path) -> dict[int, str]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["batch_hash"] for line in lines if "kind" not in line}


def start(recipe: Path, ranks: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "trainer", "train", str(recipe), f"launch.processes={ranks}"]
    return subprocess.Popen(
        command, cwd=recipe.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def steps_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--kills", type=int, default=10)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    directory = Path(tempfile.mkdtemp(prefix="kill-data-sweep-"))
    write_world(directory)
    data = {"packing": draw.choice(["documents", "best_fit"]), "mask_documents": draw.choice([True, False])}

    def recipe_of(name: str) -> Path:
        return write_recipe(
            directory, f"{name}.yaml", run={"directory": name, "steps": STEPS}, checkpoint={"every_steps": 3},
            batch={"global_size": 8, "micro_size": 1}, data=data,
        )  # fmt: skip

    assert start(recipe_of("straight"), 2).wait(600) == 0
    expected = hashes(directory / "straight")
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert len(set(expected.values())) == STEPS
    killed, run, sizes = recipe_of("killed"), directory / "killed", []
    while len(sizes) < arguments.kills:
        ranks = WORLD_SIZES[len(sizes) % len(WORLD_SIZES)]
        process, before = start(killed, ranks), steps_of(run)
        # Not before it has trained something, so that every start counts.
        while process.poll() is None and steps_of(run) <= before + 2:
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 0.5))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
        sizes.append(ranks)
        print(f"kill {len(sizes)}: {ranks} ranks, {steps_of(run)} lines", flush=True)
    code = start(killed, WORLD_SIZES[len(sizes) % len(WORLD_SIZES)]).wait(600)
    assert code == 0, code
    assert hashes(run) == expected, "batches differ"
    for step in (1, STEPS // 2, STEPS):
        command = [sys.executable, "-m", "trainer", "data", "which", str(run), "--step", str(step), "--json"]
        answer = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True).stdout
        assert json.loads(answer)["batch_hash"] == expected[step], step
    print(f"seed {arguments.seed}: {len(sizes)} kills at world sizes {sizes}, {data}: {STEPS} batches identical")


if __name__ == "__main__":
    main()
