"""`trainer train` under signals: SIGTERM in the middle, a second start beside it, SIGKILL of its launcher."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from story import MORE_STEPS, NOISE, Started, Story, curve, evaluations, read_metrics, train, write_world

LONG = ["run.steps=100000", "checkpoint.every_steps=null", "evaluation.every_steps=null"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("signals"))


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Story:
    return train(folder, "undisturbed", f"run.steps={MORE_STEPS}")


@pytest.fixture(scope="module")
def start(folder: Path) -> Iterator[Callable[..., Started]]:
    """Start runs in the background; kill what a failed test has left."""
    started: list[Started] = []

    def make(*arguments: str) -> Started:
        started.append(Started(folder, *arguments))
        return started[-1]

    yield make
    for run in started:
        if run.process.poll() is None:
            ranks = psutil.Process(run.process.pid).children(recursive=True)
            run.process.kill()
            run.process.wait(timeout=10)
            psutil.wait_procs(ranks, timeout=10)


@pytest.fixture(scope="module")
def stopped(start: Callable[..., Started]) -> Started:
    run = start("stopped", f"run.steps={MORE_STEPS}", "checkpoint.every_steps=null")
    run.wait_for_step(3)
    run.end(signal.SIGTERM)
    return run


@pytest.fixture(scope="module")
def facts(stopped: Started) -> dict[str, Any]:
    """status.json as the stop left it."""
    return json.loads((stopped.directory / "status.json").read_text())


@pytest.fixture(scope="module")
def continued(folder: Path, stopped: Started, facts: dict[str, Any]) -> Story:
    return train(folder, "stopped", f"run.steps={MORE_STEPS}", "checkpoint.every_steps=null")


class TestStopped:
    """SIGTERM to the launcher in the middle of a run, then the same command again."""

    def test_exit_code_and_status(self, stopped: Started, facts: dict[str, Any]) -> None:
        assert stopped.process.returncode == 75, stopped.output.read_text()
        assert (facts["state"], facts["exit_code"]) == ("stopped", 75)
        assert 3 <= facts["step"] < MORE_STEPS, "the run was too fast to be stopped"
        assert facts["last_checkpoint_step"] == facts["step"]
        assert facts["reason"]

    def test_console_says_what_to_do(self, stopped: Started) -> None:
        said = stopped.output.read_text()
        assert "SIGTERM" in said
        assert "Traceback" not in said
        assert not NOISE.search(said)

    def test_continued_equals_undisturbed(self, continued: Story, undisturbed: Story) -> None:
        assert continued.done.returncode == 0, continued.done.stderr
        assert curve(continued.directory) == curve(undisturbed.directory)
        # A stop may come between two evaluations; none is lost, none is made twice.
        assert evaluations(continued.directory) == evaluations(undisturbed.directory)
        assert continued.status["state"] == "finished"
        assert continued.status["resumed_step"] >= 3


@pytest.fixture(scope="module")
def running(start: Callable[..., Started]) -> tuple[Started, list[psutil.Process]]:
    run = start("long", *LONG)
    return run, run.wait_for_step(2)


class TestRunning:
    """A long run: a second start on its directory, then SIGKILL of its launcher."""

    def test_second_start_is_refused(self, running, folder: Path) -> None:
        second = train(folder, "long", *LONG)
        assert second.done.returncode == 2, second.done
        assert re.search(r"runs/long.*pid \d+", second.done.stderr)
        assert "Traceback" not in second.done.stderr

    def test_second_start_does_not_disturb_the_first(self, running) -> None:
        first, _ = running
        assert json.loads((first.directory / "status.json").read_text())["state"] == "running"
        assert [path.name for path in (first.directory / "attempts").iterdir()] == ["0001"]
        last = read_metrics(first.directory)[-1]["step"]
        deadline = time.monotonic() + 20
        while read_metrics(first.directory)[-1]["step"] <= last:
            assert time.monotonic() < deadline, "the first run no longer moves"
            time.sleep(0.05)
        steps = [line["step"] for line in read_metrics(first.directory) if "kind" not in line]
        assert steps == list(range(1, len(steps) + 1))

    def test_sigkill_of_the_launcher_leaves_no_rank(self, running) -> None:
        run, ranks = running
        assert len(ranks) >= 2
        run.process.kill()
        run.process.wait(timeout=10)
        _, alive = psutil.wait_procs(ranks, timeout=3)
        assert not alive

    def test_status_after_the_kill_is_not_running(self, running, folder: Path) -> None:
        run, _ = running
        assert run.process.poll() is not None
        done = tiny.run(tiny.command("status", run.directory), folder)
        assert done.returncode == 0
        state = next(line for line in done.stdout.splitlines() if line.startswith("state"))
        assert not re.fullmatch(r"state\s+running(, .*)?", state), f"nothing runs any more: {state}"
