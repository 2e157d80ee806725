"""`trainer data` as a user runs it: real processes, real files, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
STDLIB = Path(json.__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def run(*args: object, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer", "data", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd, timeout=120, check=False)
    assert done.returncode == code, f"{command}\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and a training and a validation set, made on the command line from an empty directory."""
    path = tmp_path_factory.mktemp("cli")
    run("tokenizer", "--input", STDLIB, "--output", "tokenizer", "--vocab-size", 500, cwd=path)
    done = run(
        *("tokenize", "--input", STDLIB / "decoder.py", STDLIB / "encoder.py", STDLIB / "scanner.py"),
        *("--tokenizer", "tokenizer", "--output", "data/code", "--workers", 2),
        cwd=path,
    )
    assert done.stdout.startswith("data/code: 3 documents, ")
    assert done.stderr == ""
    return path


def test_input_takes_several_values_in_order(folder: Path) -> None:
    names = [STDLIB / name for name in ("decoder.py", "encoder.py", "scanner.py")]
    for output, inputs in {
        "repeated": ["--input", names[0], "--input", names[1], "--input", names[2]],
        "mixed": ["--input", names[0], names[1], f"--input={names[2]}"],
    }.items():
        run("tokenize", *inputs, "--workers", 1, "--tokenizer", "tokenizer", "--output", output, cwd=folder)
        assert (folder / f"{output}.bin").read_bytes() == (folder / "data" / "code.bin").read_bytes()


def test_info(folder: Path) -> None:
    facts = json.loads(run("info", "data/code", "--json", cwd=folder).stdout)
    side_car = json.loads((folder / "data" / "code.json").read_text())
    assert (facts["num_documents"], facts["vocab_size"]) == (3, 500)
    assert facts["fingerprint"] == side_car["fingerprint"]
    assert facts["tokenizer"] == side_car["tokenizer"]
    text = run("info", "data/code", cwd=folder).stdout
    assert f"num documents        3\nnum tokens           {facts['num_tokens']:,}\n" in text


def test_verify_accepts_and_refuses(folder: Path, tmp_path: Path) -> None:
    assert "sound" in run("verify", "data/code", "--full", cwd=folder).stdout
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"a{suffix}").write_bytes((folder / "data" / f"code{suffix}").read_bytes())
    raw = bytearray((tmp_path / "a.bin").read_bytes())
    raw[100] ^= 1
    (tmp_path / "a.bin").write_bytes(raw)
    done = run("verify", tmp_path / "a", code=2)
    assert "a.bin bytes 0.." in done.stderr
    assert done.stdout == ""
    listed = json.loads(run("verify", tmp_path / "a", "--json", code=2).stdout)
    assert listed["ok"] is False
    assert len(listed["problems"]) == 1
    (tmp_path / "a.json").unlink()
    done = run("verify", tmp_path / "a", "--full")
    assert "a.json is missing" in done.stderr


def test_validation_split(folder: Path) -> None:
    done = run(
        *("tokenize", "--input", STDLIB.parent / "email", "--tokenizer", "tokenizer", "--output", "t"),
        *("--validation-fraction", 0.3, "--validation-output", "v"),
        cwd=folder,
    )
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["t", "v"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["tokenize", "--input", "no", "nor.txt", "--tokenizer", "tokenizer", "--output", "x"],
            "nor.txt: doesn't exist",
        ),
        (["tokenize", "--input", STDLIB, "--tokenizer", "no/where", "--output", "x"], "isn't a tokenizer"),
        (["tokenize", "--input", STDLIB, "--tokenizer", "tokenizer", "--output", "data/code"], "exists already"),
        (["tokenize", "--tokenizer", "tokenizer", "--output", "x"], "--input"),
        (["tokenizer", "--input", STDLIB, "--output", "x", "--vocab-size", "10"], "at least 257"),
        (["tokenizer", "--input", STDLIB, "--output", "x", "--vocab-size", "300", "--kind", "x"], "sentencepiece"),
        (["info", "nothing"], "nothing.idx: doesn't exist"),
        (["verify", "nothing"], "nothing.bin: doesn't exist"),
    ],
)
def test_bad_input_is_exit_code_2_and_nothing_is_written(folder: Path, args: list[object], message: str) -> None:
    before = sorted(folder.rglob("*"))
    assert message in run(*args, code=2, cwd=folder).stderr
    assert sorted(folder.rglob("*")) == before


def test_looking_at_shards_loads_no_heavy_library(folder: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "trainer", "data", "verify", "data/code"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=folder, timeout=60, check=True)
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "trainer.data.shard_set" in loaded
    assert not loaded & {"torch", "deepspeed", "transformers", "tokenizers", "datasets", "pyarrow"}


def children_after_start(process: subprocess.Popen[bytes], output: Path) -> list[psutil.Process]:
    """Wait until tokens are being written, then return every process below."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        partial = Path(f"{output}.bin.partial")
        if partial.exists() and partial.stat().st_size > 0:
            return psutil.Process(process.pid).children(recursive=True)
        assert process.poll() is None, "it ended before anything could be stopped"
        time.sleep(0.02)
    raise AssertionError("nothing was written")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_shards_and_no_processes(
    folder: Path, tmp_path: Path, kind: signal.Signals
) -> None:
    line = json.dumps({"text": "def f(x):\n    return x + 1\n" * 40}) + "\n"
    (tmp_path / "big.jsonl").write_text(line * 60_000)
    output = tmp_path / "out"
    command = [sys.executable, "-m", "trainer", "data", "tokenize", "--input", str(tmp_path / "big.jsonl")]
    command += ["--tokenizer", str(folder / "tokenizer"), "--output", str(output), "--workers", "2"]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    below = children_after_start(process, output)
    assert len(below) >= 2
    if kind == signal.SIGINT:
        os.killpg(process.pid, kind)  # what Ctrl-C does: every process of the terminal's group
    else:
        process.kill()
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert psutil.wait_procs(below, timeout=20)[1] == []
    assert not any(Path(f"{output}{suffix}").exists() for suffix in (".bin", ".idx", ".json"))
    if kind == signal.SIGINT:
        assert list(tmp_path.glob("*.partial")) == []
