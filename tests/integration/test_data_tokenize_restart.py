"""`trainer data tokenize` killed with SIGKILL and started again: it goes on, and the bytes are those of one run."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from trainer.data.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
# The command line itself, with more frequent records, small chunks, and a pause after each to be hit at many places.
PROGRAM = """
import time
from trainer.data import tokenize
tokenize._JOURNAL_SECONDS, tokenize._CHUNK_CHARACTERS = 0.05, 1 << 16
add = tokenize.add
def slow(*arguments):
    time.sleep(PAUSE)
    add(*arguments)
tokenize.add = slow
from trainer.cli.main import main
main()
"""
MODES: dict[str, list[str]] = {
    "one": ["--workers", "1"],
    "two": ["--workers", "2"],
    "sharded": ["--workers", "1", "--shard-size", "200K"],
    "split": ["--workers", "2", "--shard-size", "100K", "--validation-fraction", "0.3", "--validation-output", "out/v"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three megabytes of Python, as JSON Lines and as files, and a tokenizer."""
    path = tmp_path_factory.mktemp("restart")
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [file.read_text(encoding="utf-8") for file in sorted(library.glob("*.py"))]
    (path / "texts").mkdir()
    for number, text in enumerate(texts[:20]):
        (path / "texts" / f"{number:03}.py").write_text(text)
    (path / "texts" / "noise.bin").write_bytes(bytes(10))
    functions = [part for text in texts[20:100] for part in text.split("\n\n\n")]
    (path / "code.jsonl").write_text("".join(json.dumps({"text": text, "n": len(text)}) + "\n" for text in functions))
    train_tokenizer([str(path / "code.jsonl")], path / "tokenizer", 1000)
    return path


def start(
    folder: Path, where: Path, options: Iterable[str], faults: str = "", pause_seconds: float = 0.0
) -> subprocess.Popen[str]:
    (where / "out").mkdir(exist_ok=True)
    program = PROGRAM.replace("PAUSE", str(pause_seconds))
    command = [sys.executable, "-c", program, "data", "tokenize", "--input", str(folder / "code.jsonl")]
    command += [str(folder / "texts"), "--tokenizer", str(folder / "tokenizer"), "--output", "out/t"]
    command += ["--where", "n>=20", *options]
    environment = {**ENVIRONMENT, "TRAINER_FAULTS": faults, "TRAINER_ALLOW_FAULTS": "1" if faults else "0"}
    return subprocess.Popen(
        command, cwd=where, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def content(where: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((where / "out").iterdir())}


def finish(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return errors


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for mode, options in MODES.items():
        where = tmp_path_factory.mktemp(mode)
        assert "continuing" not in finish(start(folder, where, options))
        found[mode] = content(where)
    assert found["one"] == found["two"]
    assert len(found["sharded"]) > 3 * 4
    return found


@pytest.mark.parametrize("mode", MODES)
def test_killed_at_random_it_continues_to_the_same_bytes(
    folder: Path, tmp_path: Path, mode: str, undisturbed: dict[str, dict[str, bytes]]
) -> None:
    chance = random.Random(mode)
    continued: list[int] = []
    for _ in range(3):
        process = start(folder, tmp_path, MODES[mode], pause_seconds=0.1)
        deadline = time.monotonic() + chance.uniform(1.0, 2.0)
        journal = tmp_path / "out" / "t.progress.json"
        while process.poll() is None and (time.monotonic() < deadline or not journal.exists()):
            time.sleep(0.01)
        process.kill()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, errors
        continued += [int(n.replace(",", "")) for n in re.findall(r"continuing at document ([\d,]+)", errors)]
    errors = finish(start(folder, tmp_path, MODES[mode]))
    continued += [int(n.replace(",", "")) for n in re.findall(r"continuing at document ([\d,]+)", errors)]
    assert content(tmp_path) == undisturbed[mode]
    assert continued, "it was never continued"
    assert continued == sorted(continued)
    assert continued[-1] > 0  # how far it came in two seconds depends on what else the machine does


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("tokenize_journal:*:3:kill", "continuing at document"),  # as soon as the record names three shards
        ("tokenize_publish:0:0:kill", "get their names"),  # before anything has its name
        ("tokenize_publish:0:1:kill", "get their names"),  # validation has, training hasn't
        ("tokenize_publish:0:2:kill", "get their names"),  # everything has, the record is still there
    ],
)
def test_killed_at_the_worst_moments(
    folder: Path, tmp_path: Path, fault: str, words: str, undisturbed: dict[str, dict[str, bytes]]
) -> None:
    process = start(folder, tmp_path, MODES["split"], fault)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert words in finish(start(folder, tmp_path, [*MODES["split"], "--workers", "1"]))
    assert content(tmp_path) == undisturbed["split"]


def killed(folder: Path, where: Path, mode: str) -> None:
    process = start(folder, where, MODES[mode], "tokenize_journal:*:*:kill")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert (where / "out" / "t.progress.json").exists()


def test_changed_options_or_inputs_start_over(
    folder: Path, tmp_path: Path, undisturbed: dict[str, dict[str, bytes]]
) -> None:
    killed(folder, tmp_path, "sharded")
    errors = finish(start(folder, tmp_path, [*MODES["one"], "--min-characters", "5"]))
    assert "starting over: options changed" in errors
    assert set(content(tmp_path)) == {"t.bin", "t.idx", "t.json"}


def test_a_touched_input_starts_over(folder: Path, tmp_path: Path, undisturbed: dict[str, dict[str, bytes]]) -> None:
    killed(folder, tmp_path, "sharded")
    os.utime(folder / "texts" / "001.py")
    assert "starting over: inputs changed" in finish(start(folder, tmp_path, MODES["sharded"]))
    assert content(tmp_path) == undisturbed["sharded"]


def test_damaged_partial_files_start_over(
    folder: Path, tmp_path: Path, undisturbed: dict[str, dict[str, bytes]]
) -> None:
    """What the record names must be what is on disk: nothing is built on a flipped bit or a cut file."""
    for damage in (lambda p: p.write_bytes(b"\xff" + p.read_bytes()[1:]), lambda p: os.truncate(p, 10)):
        killed(folder, tmp_path, "one")
        damage(tmp_path / "out" / "t.bin.partial")
        errors = finish(start(folder, tmp_path, [*MODES["one"], "--overwrite"]))
        assert "starting over: the partial files" in errors
        assert content(tmp_path) == undisturbed["one"]
        for path in (tmp_path / "out").iterdir():
            path.unlink()


def test_a_second_process_does_not_disturb_the_first(
    folder: Path, tmp_path: Path, undisturbed: dict[str, dict[str, bytes]]
) -> None:
    first = start(folder, tmp_path, MODES["sharded"], pause_seconds=0.05)
    while not (tmp_path / "out" / "t-00001.bin.partial").exists():
        assert first.poll() is None
        time.sleep(0.01)
    for options in (MODES["sharded"], [*MODES["sharded"], "--min-characters", "5"]):
        second = start(folder, tmp_path, options)
        _, errors = second.communicate(timeout=60)
        assert second.returncode == 2
        assert "being written by another process" in errors
    finish(first)
    assert content(tmp_path) == undisturbed["sharded"]
