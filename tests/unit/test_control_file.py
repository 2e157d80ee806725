"""RUN/control.json: what is written is read back, and nothing else is heeded."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from trainer.core.control_file import (
    ControlFileError,
    control_path,
    new_command,
    read_command,
    stop_file_problem,
    stop_path,
    withdraw_command,
    write_command,
)
from trainer.core.errors import RefusedError

pytestmark = pytest.mark.fast


def test_a_command_is_read_back_private_and_withdrawn(tmp_path: Path) -> None:
    assert read_command(tmp_path) is None
    command = new_command("stop-after", 7)
    write_command(tmp_path, command)
    assert read_command(tmp_path) == command
    assert stat.S_IMODE(control_path(tmp_path).stat().st_mode) == 0o600
    withdraw_command(tmp_path, new_command("save"))
    assert read_command(tmp_path) == command, "another command is left alone"
    withdraw_command(tmp_path, command)
    assert read_command(tmp_path) is None


@pytest.mark.parametrize(
    ("action", "value"),
    [
        ("stop-after", None),
        ("stop-after", 0),
        ("stop-after", "x"),
        ("log-level", "loud"),
        ("log-level", 5),
        ("save", 3),
    ],
)
def test_a_value_that_an_action_does_not_take_is_refused(action, value) -> None:
    with pytest.raises(RefusedError):
        new_command(action, value)


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "../../etc"}, {"id": 5}, {"action": "exec"}, {"action": ["stop"]}, {"value": 1}, {"value": True},
        {"who": "a\nb"}, {"who": "x" * 300}, {"time_unix": "now"}, {"requeue": 1}, {"version": 2}, {"more": 1},
        {"action": "save", "requeue": True},
    ],
)  # fmt: skip
def test_a_bad_field_is_refused(tmp_path: Path, changes: dict) -> None:
    write_command(tmp_path, new_command("stop"))
    path = control_path(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ControlFileError):
        read_command(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 4000, b" " * 5000, b"null", b'"stop"'])
def test_other_content_is_refused(tmp_path: Path, content: bytes) -> None:
    write_command(tmp_path, new_command("stop"))
    control_path(tmp_path).write_bytes(content)
    with pytest.raises(ControlFileError):
        read_command(tmp_path)


def _link(path: Path) -> None:
    path.rename(path.with_name("aside"))
    path.symlink_to("aside")


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "harm",
    [
        _link, _fifo, _directory, lambda path: path.chmod(0o620), lambda path: path.chmod(0o602),
        lambda path: os.link(path, path.with_name("second")),
    ],
)  # fmt: skip
def test_a_file_that_another_may_have_made_is_refused(tmp_path: Path, harm) -> None:
    write_command(tmp_path, new_command("stop"))
    harm(control_path(tmp_path))
    with pytest.raises(ControlFileError):
        read_command(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_files_of_another_user_are_refused(tmp_path: Path) -> None:
    write_command(tmp_path, new_command("stop"))
    stop_path(tmp_path).touch()
    assert stop_file_problem(tmp_path) == ""
    os.chown(control_path(tmp_path), 12345, -1)
    os.chown(stop_path(tmp_path), 12345, -1)
    with pytest.raises(ControlFileError, match="belongs to user 12345"):
        read_command(tmp_path)
    assert stop_file_problem(tmp_path) == "belongs to user 12345"


def test_a_stop_file_is_a_regular_file(tmp_path: Path) -> None:
    assert stop_file_problem(tmp_path) is None
    stop_path(tmp_path).mkdir()
    assert stop_file_problem(tmp_path) == "is not a regular file"
