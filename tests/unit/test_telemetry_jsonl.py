"""metrics.jsonl: cut back on resume, torn lines repaired, whole lines also on a full disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_telemetry_record import evaluation_record, step_record

from trainer.telemetry.sinks.append import AppendFile
from trainer.telemetry.sinks.jsonl import JsonlSink

pytestmark = pytest.mark.fast


def write_run(path: Path, first: int, last: int, resume_step: int, loss: float = 1.0) -> None:
    sink = JsonlSink(path, resume_step)
    if first == 1:
        sink.evaluation(evaluation_record(0))
    for step in range(first, last + 1):
        sink.step(step_record(step, loss=loss))
        if step % 5 == 0:
            sink.evaluation(evaluation_record(step))
    sink.close()


def steps_and_kinds(path: Path) -> list[tuple[int, str]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["step"], line.get("kind", "step")) for line in lines]


def expected(last: int) -> list[tuple[int, str]]:
    result = [(0, "evaluation")]
    for step in range(1, last + 1):
        result.append((step, "step"))
        if step % 5 == 0:
            result.append((step, "evaluation"))
    return result


def test_lines_are_on_disk_before_the_file_is_closed(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", 0)
    sink.step(step_record(1))
    assert steps_and_kinds(tmp_path / "metrics.jsonl") == [(1, "step")]
    sink.close()
    sink.close()


@pytest.mark.parametrize("torn", [b"", b'{"step": 13, "lo', b'\xff\xfe{"step"', b"[" * 100_000, b"null\n3\n[]\n"])
def test_resume_cuts_back_and_repairs(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write_run(path, 1, 12, 0, loss=1.0)
    with path.open("ab") as file:
        file.write(torn)
    write_run(path, 6, 15, 5, loss=2.0)
    assert steps_and_kinds(path) == expected(15)
    losses = {line["step"]: line["loss"] for line in map(json.loads, path.open()) if "loss" in line}
    assert losses == {step: 1.0 if step <= 5 else 2.0 for step in range(1, 16)}
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_last_line_that_only_lacks_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(step_record(1).to_json_line())
    JsonlSink(path, 1).close()
    assert path.read_text() == step_record(1).to_json_line() + "\n"


def test_a_fresh_start_begins_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_run(path, 1, 7, 0)
    write_run(path, 1, 5, 0)
    assert steps_and_kinds(path) == expected(5)


def test_a_file_that_needs_no_cut_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_run(path, 1, 7, 0)
    before = path.stat().st_ino, path.read_bytes()
    JsonlSink(path, 7).close()
    assert (path.stat().st_ino, path.read_bytes()) == before


def test_the_mode_survives_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_run(path, 1, 7, 0)
    path.chmod(0o640)
    JsonlSink(path, 3).close()
    assert path.stat().st_mode & 0o777 == 0o640


@given(cut=st.integers(0, 2000), resume_step=st.integers(1, 12))
def test_cut_anywhere_by_a_crash(tmp_path_factory: pytest.TempPathFactory, cut: int, resume_step: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    write_run(path, 1, 10, 0)
    whole = path.read_bytes()
    left = whole[: max(0, len(whole) - cut)]
    path.write_bytes(left)
    JsonlSink(path, resume_step).close()
    kept = [line for line in whole.splitlines(keepends=True) if json.loads(line)["step"] <= resume_step]
    result = path.read_bytes().splitlines(keepends=True)
    assert result == kept[: len(result)]
    # Nothing but what the crash took is missing.
    assert len(result) >= sum(whole.index(line) + len(line) <= len(left) for line in kept)


def test_a_full_disk_leaves_whole_lines_and_training_goes_on(tmp_path: Path) -> None:
    # A file size limit cuts a write short and then fails it, exactly as a full disk does.
    code = """
import json, logging, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_telemetry_record import step_record
from trainer.telemetry.sinks.base import Fanout
from trainer.telemetry.sinks.jsonl import JsonlSink
logging.basicConfig(format="LOGGED %(message)s", stream=sys.stdout)
path = Path(sys.argv[1])
sink = Fanout([JsonlSink(path, 0)])
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
for step in range(1, 9):
    sink.step(step_record(step))
assert path.read_bytes().endswith(b"}\\n"), "a killed process would leave a torn line"
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
sink.step(step_record(9))
sink.close()
"""
    path = tmp_path / "metrics.jsonl"
    result = subprocess.run(
        [sys.executable, "-c", code, str(path), str(Path(__file__).parent)], capture_output=True, text=True, check=True
    )
    assert result.stdout.count("LOGGED") == 1, result.stdout
    assert "File too large" in result.stdout
    assert steps_and_kinds(path) == [(1, "step"), (2, "step"), (9, "step")]


def test_append_reports_a_full_device() -> None:
    file = AppendFile(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left"):
        file.append(b"x")
    file.close()


def test_a_failed_cut_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    write_run(path, 1, 7, 0)
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        JsonlSink(path, 3)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
