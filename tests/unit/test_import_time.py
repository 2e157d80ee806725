"""Verbs that a login node runs start without the machine-learning stack, and quickly."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

pytestmark = pytest.mark.fast

HEAVY = {"torch", "deepspeed", "transformers", "datasets", "accelerate", "peft"}
LIGHT_VERBS = {
    "help": ["--help"],
    "train help": ["train", "--help"],
    "data help": ["data", "--help"],
    "export help": ["export", "--help"],
    "check": ["check", "tiny.yaml"],
    "schema": ["check", "--schema"],
    "status": ["status", "runs/tiny"],
    "submit": ["submit", "tiny.yaml", "--gpus-per-node", "2", "--dry-run"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny.write_world(tmp_path_factory.mktemp("light"))
    tiny.write_recipe(path)
    run = path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "status.json").write_text(json.dumps({"state": "finished", "step": 8, "total_steps": 8, "exit_code": 0}))
    return path


def imported(stderr: str) -> set[str]:
    """Return the top-level packages in the output of ``python -X importtime``."""
    return {name.split(".")[0] for name in re.findall(r"^import time:.*\|\s*([\w.]+)\s*$", stderr, re.MULTILINE)}


@pytest.mark.parametrize("verb", LIGHT_VERBS)
def test_loads_nothing_heavy(verb: str, folder: Path) -> None:
    argv = [sys.executable, "-X", "importtime", "-m", "trainer", *LIGHT_VERBS[verb]]
    done = tiny.run(argv, folder)
    assert done.returncode == 0, done.stderr[-2000:]
    found = imported(done.stderr)
    assert {"trainer", "typer"} <= found, "the output of importtime was not understood"
    assert not found & HEAVY


def test_a_heavy_import_would_be_seen(folder: Path) -> None:
    (folder / "accelerate").mkdir()
    (folder / "accelerate" / "__init__.py").touch()
    done = tiny.run([sys.executable, "-X", "importtime", "-c", "import accelerate"], folder)
    assert imported(done.stderr) & HEAVY == {"accelerate"}


def measure(argv: list[str], folder: Path) -> tuple[float, float]:
    """Return (wall-clock seconds, user + system seconds) of one run."""
    begin = time.perf_counter()
    # With byte code, as an installed command has it: the tests themselves may run without.
    environment = tiny.environment(PYTHONPYCACHEPREFIX=str(folder / "byte-code"))
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    child = subprocess.Popen(argv, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    return time.perf_counter() - begin, usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("verb", ["help", "check"])
def test_starts_in_half_a_second(
    verb: str, folder: Path, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    """Asserted on CPU time, the least of several: what else runs can only add to it. The wall clock is printed too."""
    argv = tiny.command(*LIGHT_VERBS[verb])
    measure(argv, folder)  # writes the byte code
    samples = [measure(argv, folder) for _ in range(7)]
    wall, cpu = (min(column) for column in zip(*samples, strict=True))
    record_property("wall_seconds", wall)
    record_property("cpu_seconds", cpu)
    with capsys.disabled():
        print(f"\ntrainer {' '.join(LIGHT_VERBS[verb])}: least of 7: {wall:.3f} s wall clock, {cpu:.3f} s CPU")
    assert cpu < 0.5
