"""The wheel, installed away from the checkout, runs the quick start: tokenizer to sample.

Its environment borrows the dependencies of the one the tests run in (they are the same files pip would install);
the trainer itself comes from the wheel.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(argv: list[str], cwd: Path, timeout: float = 280) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        argv, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False, env=environment
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The console script of a fresh environment with the wheel in it."""
    directory = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)], cwd=ROOT)
    [wheel] = directory.glob("*.whl")
    venv.create(directory / "env", with_pip=True)
    python = directory / "env" / "bin" / "python"
    run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], cwd=directory)
    site = Path(
        run([str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], cwd=directory).strip()
    )
    # A path line is not followed further, so the editable install of the checkout stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    where = run([str(python), "-c", "import trainer; print(trainer.__file__)"], cwd=directory)
    assert where.startswith(str(directory)), where
    return directory / "env" / "bin" / "trainer"


@pytest.fixture(scope="module")
def quickstart(trainer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("elsewhere")
    return directory, run([str(trainer), "quickstart", "--steps", "8"], cwd=directory)


def test_resources_are_found(trainer: Path, tmp_path: Path) -> None:
    code = (
        "from trainer.core.resources import resource_directory as r;"
        "print(*sorted(p.name for n in ('ds_configs', 'slurm', 'recipes') for p in r(n).iterdir()))"
    )
    found = run([str(trainer.parent / "python"), "-c", code], cwd=tmp_path).split()
    expected = [
        path.name for folder in ("ds_configs", "slurm", "launch/recipes") for path in sorted((ROOT / folder).iterdir())
    ]
    assert sorted(found) == sorted(expected)


def test_quick_start_runs_to_the_end(quickstart: tuple[Path, str]) -> None:
    directory, output = quickstart
    run_directory = directory / "runs" / "quickstart"
    lines = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    curve = [line["validation_loss"] for line in lines if line.get("kind") == "evaluation"]
    assert lines[0]["kind"] == "evaluation"
    assert lines[0]["step"] == 0
    assert curve[-1] < curve[0] - 0.5
    assert json.loads((run_directory / "status.json").read_text())["state"] == "finished"
    assert (run_directory / "export" / "model.safetensors").exists()
    for number in range(1, 7):
        assert f"[{number}/6]" in output
    assert "tensorboard --logdir" in output
    assert "Warning" not in output
    assert "DeepSpeed" not in output
    # What it says to do on a cluster can be done.
    [line] = [line for line in output.splitlines() if line.startswith("on a cluster")]
    assert "#SBATCH --nodes=2" in run(line.removeprefix("on a cluster").split(), cwd=directory)


def test_the_export_loads_in_plain_transformers_with_the_same_loss(quickstart: tuple[Path, str]) -> None:
    directory, _ = quickstart
    run_directory = directory / "runs" / "quickstart"
    code = """
import json, sys
import numpy, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
tokens = torch.from_numpy(numpy.fromfile(sys.argv[2], dtype="uint16").astype("int64"))
length, loss, count = 256, 0.0, 0
with torch.no_grad():
    for start in range(0, len(tokens) - length, length):
        piece = tokens[start : start + length + 1]
        logits = model(piece[None, :-1]).logits.float()
        loss += torch.nn.functional.cross_entropy(logits[0], piece[1:], reduction="sum").item()
        count += length
text = "def f(x):  # \\u4f60\\u597d"
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(json.dumps([loss / count, tokenizer.decode(tokenizer(text)["input_ids"]) == text]))
"""
    argv = [sys.executable, "-c", code, str(run_directory / "export"), str(run_directory / "data" / "code-valid.bin")]
    answers = [line for line in run(argv, cwd=directory).splitlines() if line.startswith("[") and line.endswith("]")]
    loss, round_trip = json.loads(answers[-1])
    lines = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    last = [line["validation_loss"] for line in lines if line.get("kind") == "evaluation"][-1]
    assert abs(loss - last) < 1e-3
    assert round_trip


def test_run_again_it_says_that_it_is_done(trainer: Path, quickstart: tuple[Path, str]) -> None:
    directory, _ = quickstart
    before = (directory / "runs" / "quickstart" / "metrics.jsonl").read_bytes()
    output = run([str(trainer), "quickstart", "--steps", "8"], cwd=directory)
    assert "already finished" in output
    assert (directory / "runs" / "quickstart" / "metrics.jsonl").read_bytes() == before
