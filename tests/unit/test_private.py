"""A run is private whatever the user's umask, or open to its group and to nobody else."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.core.private import (
    directory_mode,
    file_mode,
    group_access_of,
    keep_private,
    make_run_directory,
    private_like,
)
from trainer.launch.submit import write_script

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    """The worst that a user can have; what the functions change is put back."""
    previous = os.umask(0)
    yield
    keep_private("none")
    os.umask(previous)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_run_directories_are_made_private_with_what_leads_to_them(tmp_path: Path) -> None:
    keep_private("none")
    make_run_directory(tmp_path / "runs" / "a", "none")
    (tmp_path / "runs" / "a" / "file").touch()
    assert mode(tmp_path / "runs" / "a") == 0o700
    assert mode(tmp_path / "runs") == 0o700
    assert mode(tmp_path / "runs" / "a" / "file") == 0o600
    assert (directory_mode(), file_mode()) == (0o700, 0o600)


def test_a_group_may_read_and_files_take_its_name(tmp_path: Path) -> None:
    keep_private("read")
    run = tmp_path / "a"
    make_run_directory(run, "read")
    (run / "logs").mkdir(mode=directory_mode())
    (run / "logs" / "file").touch()
    assert mode(run) == 0o2750
    assert mode(run / "logs") & 0o777 == 0o750
    assert mode(run / "logs") & stat.S_ISGID
    assert mode(run / "logs" / "file") == 0o640
    assert group_access_of(run) == "read"


@pytest.mark.parametrize("names", [(), ("run.yaml",), ("logs",)])
def test_a_run_of_before_is_closed(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).touch()
    tmp_path.chmod(0o777)
    make_run_directory(tmp_path, "none")
    assert mode(tmp_path) == 0o700


def test_a_private_run_is_opened_to_its_group_with_all_that_is_in_it(tmp_path: Path) -> None:
    keep_private("none")
    run, elsewhere = tmp_path / "a", tmp_path / "elsewhere"
    make_run_directory(run, "none")
    (run / "checkpoints" / "step-00000004").mkdir(parents=True)
    files = [run / "run.yaml", run / "checkpoints" / "step-00000004" / "manifest.json"]
    for path in (*files, elsewhere, run / "two names"):
        path.touch()
    (run / "link").symlink_to(elsewhere)
    (tmp_path / "another name").hardlink_to(run / "two names")
    make_run_directory(run, "read")
    assert {mode(path) for path in (run, run / "checkpoints", files[1].parent)} == {0o2750}
    assert {mode(path) for path in files} == {0o640}
    assert {mode(path) for path in (elsewhere, run / "two names")} == {0o600}


def test_a_directory_of_other_things_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "homework").mkdir()
    tmp_path.chmod(0o755)
    make_run_directory(tmp_path, "none")
    assert mode(tmp_path) == 0o755


@pytest.mark.parametrize(("shared", "expected"), [(0o700, 0o600), (0o750, 0o640), (0o777, 0o640)])
def test_later_commands_do_as_the_run_does(tmp_path: Path, shared: int, expected: int) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(shared)
    with private_like(tmp_path / "run"):
        (tmp_path / "inside").touch()
    (tmp_path / "outside").touch()
    assert mode(tmp_path / "inside") == expected
    assert mode(tmp_path / "outside") == 0o666


def test_submitted_scripts_and_the_logs_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.touch(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    script = write_script(tmp_path / "runs" / "a", "#!/bin/sh\n")
    assert mode(script) == 0o600
    assert {mode(path) for path in (script.parents[1], script.parent, script.parents[1] / "logs")} == {0o700}
    script = write_script(tmp_path / "runs" / "b", "#!/bin/sh\n", "read")
    assert mode(script) == 0o640
    assert mode(script.parents[1]) == 0o2750
