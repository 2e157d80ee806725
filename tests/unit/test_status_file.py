"""status.json where there is no room for a second file."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from packages import give_up

from trainer.core import status_file
from trainer.core.status_file import read_status, status_path, write_status

pytestmark = pytest.mark.fast


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("words", ["", "x" * 2000], ids=["shorter", "longer"])
def test_the_old_file_is_written_over_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    write_status(tmp_path, {"state": "running", "step": 7, "more": ["a", "b", "c"]})
    size = status_path(tmp_path).stat().st_size
    monkeypatch.setattr(status_file, "replace_text", full)
    write_status(tmp_path, {"state": "failed", "reason": words})
    found = read_status(tmp_path)
    assert found is not None
    assert (found["state"], found["reason"], "step" in found) == ("failed", words, False)
    assert status_path(tmp_path).stat().st_size >= size


@pytest.mark.parametrize("fails_at", [0, 1], ids=["the spaces", "the text"])
def test_it_is_never_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    write_status(tmp_path, {"state": "running"})
    monkeypatch.setattr(status_file, "replace_text", full)
    real, calls = os.pwrite, []

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        calls.append(offset)
        return real(descriptor, data[:3] if len(calls) - 1 == fails_at else data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    write_status(tmp_path, {"state": "failed", "reason": "x" * 300})
    found = read_status(tmp_path)
    assert found is not None
    assert found["state"] == "running"


def test_other_faults_of_the_disk_leave_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    write_status(tmp_path, {"state": "running"})
    before = status_path(tmp_path).read_bytes()
    monkeypatch.setattr(status_file, "replace_text", away)
    write_status(tmp_path, {"state": "failed"})
    assert status_path(tmp_path).read_bytes() == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    command = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        give_up(f"can't mount a small file system: {done.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_file_system_without_a_free_block(small_disk: Path) -> None:
    write_status(small_disk, {"state": "running"})
    with (small_disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1024))
    write_status(small_disk, {"state": "failed", "reason": "why " * 300})
    assert (read_status(small_disk) or {})["state"] == "failed"
    before = status_path(small_disk).read_bytes()
    write_status(small_disk, {"state": "failed", "reason": "longer than a block " * 400})
    assert json.loads(status_path(small_disk).read_bytes()) == json.loads(before)
