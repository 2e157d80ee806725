"""Compiled operations are built once, and a builder that was killed keeps nobody waiting; with real builds, killed."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from trainer.core.errors import RefusedError
from trainer.engine.upstream import stale_build_lock
from trainer.engine.upstream.stale_build_lock import building, clear_dead, refuse_unless_private

NAME = "tiny"
FORK = multiprocessing.get_context("fork")  # torch is loaded already


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for built operations, and a compiler that takes as long as the file `slow` says."""
    assert shutil.which("g++"), "these tests need a C++ compiler"
    (tmp_path / "tiny.cpp").write_text('extern "C" int answer() { return 42; }\n')
    compiler = tmp_path / "g++"  # torch looks at the name
    compiler.write_text(f'#!/bin/sh\nsleep "$(cat {tmp_path}/slow)"\nexec {shutil.which("g++")} "$@"\n')
    compiler.chmod(0o755)
    (tmp_path / "slow").write_text("0")
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ops"))
    yield tmp_path
    for child in multiprocessing.active_children():
        child.kill()


def load(root: Path) -> None:
    cpp_extension.load(NAME, [str(root / "tiny.cpp")], is_python_module=False, verbose=False)


def load_safely(root: Path) -> None:
    with building(NAME):
        load(root)


def started(action: Callable[[Path], None], root: Path) -> multiprocessing.process.BaseProcess:
    def run() -> None:
        os.setpgrp()
        action(root)

    process = FORK.Process(target=run)
    process.start()
    return process


def killed(process: multiprocessing.process.BaseProcess) -> None:
    """Kill a builder with its compiler."""
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGKILL)
    process.join(10)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def test_a_killed_build_is_built_again(root: Path) -> None:
    """Killed by us or by plain torch; torch alone would wait for ever, which is seen here for two seconds."""
    baton = root / "ops" / NAME / "lock"
    for builder in (load, load_safely):
        (root / "slow").write_text("1000")
        first = started(builder, root)
        wait_for(baton)
        killed(first)
        assert baton.exists(), "the dead builder's file"
        (root / "slow").write_text("0")
        plain = started(load, root)
        plain.join(2)
        assert plain.is_alive(), "torch waits for its file: is stale_build_lock still needed?"
        killed(plain)
        ours = started(load_safely, root)
        ours.join(60)
        assert ours.exitcode == 0
        assert not baton.exists()
        shutil.rmtree(root / "ops")


def test_a_builder_that_lives_is_waited_for(root: Path) -> None:
    """One of plain torch, which has no lock of ours, and one of ours: each builds once."""
    for builder in (load, load_safely):
        (root / "slow").write_text("0.7")
        first = started(builder, root)
        wait_for(root / "ops" / NAME / "lock")
        second = started(load_safely, root)
        second.join(60)
        assert (second.exitcode, first.exitcode) == (0, 0), "the second ended after the first"
        built = (root / "ops" / NAME / ".ninja_log").read_text().splitlines()
        assert len(built) == 3, "a header, a compilation, a link"
        shutil.rmtree(root / "ops")


def test_on_a_shared_file_system_a_change_is_waited_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder may be on another host: what counts is that nothing changes, by the file system's clock."""
    monkeypatch.setattr(stale_build_lock, "may_be_shared", lambda _: True)
    directory = root / "op"
    directory.mkdir()
    baton, built = directory / "lock", directory / "x.o"
    baton.touch()
    os.utime(baton, (1, 1))
    built.touch()
    said: list[str] = []

    def work() -> None:
        for _ in range(8):
            time.sleep(0.25)
            built.touch()

    builder = FORK.Process(target=work)
    builder.start()
    clear_dead(baton, said.append, seconds=1.0)
    assert not builder.is_alive(), "removed while somebody worked"
    assert not baton.exists()
    assert "a builder on another host" in said[0]
    assert "its builder died" in said[-1]


def test_operations_of_others_are_not_loaded(root: Path) -> None:
    directory = root / "ops"
    refuse_unless_private(directory)
    assert directory.stat().st_mode & 0o777 == 0o700
    directory.chmod(0o777)
    with pytest.raises(RefusedError, match="others can write there"):
        refuse_unless_private(directory)
    directory.chmod(0o755)
    refuse_unless_private(directory)
    assert directory.stat().st_mode & 0o777 == 0o700
