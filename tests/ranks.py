"""Start ranks for tests: real processes over gloo, always with a time limit, killed together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from trainer.core.environ import RankEnvironment, export
from trainer.launch.ports import free_port

TESTS = Path(__file__).parent


def rank_environment(rank: int, world_size: int, port: int, **more: str) -> dict[str, str]:
    """Return os.environ with the place of one rank in it."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    export(RankEnvironment(rank, world_size, rank, world_size, 0, "127.0.0.1", port, "environment"), variables)
    variables.pop("TRAINER_LAUNCHER", None)
    return variables


def run_workers(script: Path, spec: dict[str, Any], world_size: int, directory: Path, timeout: float = 240) -> Any:
    """Run ``script SPEC RESULT`` as ranks and return what rank 0 wrote. A rank that fails fails the test."""
    directory.mkdir(parents=True, exist_ok=True)
    specification, result = directory / "spec.json", directory / "result.json"
    specification.write_text(json.dumps(spec))
    port = free_port("127.0.0.1")
    logs = [directory / f"worker-{rank}.log" for rank in range(world_size)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(specification), str(result)],
            env=rank_environment(rank, world_size, port),
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
    assert codes == [0] * world_size, "\n".join(log.read_text()[-3000:] for log in logs)
    return json.loads(result.read_text())


def run_reference(spec: dict[str, Any], directory: Path) -> list[list[float]]:
    """Run the plain PyTorch loop in a process of its own and return [loss, gradient norm] a step."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "reference.json"
    path.write_text(json.dumps(spec))
    script = TESTS / "distributed" / "reference.py"
    done = subprocess.run(
        [sys.executable, str(script), str(path)], capture_output=True, text=True, timeout=180, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
