"""Every way to end a run: signals anywhere and twice, the time limit, trainer control and the stop file."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
from forked_runs import Trainer

from trainer.checkpoint import layout
from trainer.checkpoint.verify import damaged_files
from trainer.core.control_file import control_path, new_command, stop_path, write_command
from trainer.core.done_file import done_path, read_done

ENDLESS = ("run.steps=1000000", "checkpoint.every_steps=null", "evaluation.every_steps=null")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    with Trainer(tmp_path_factory.mktemp("stopping")) as started:
        yield started


@pytest.fixture(scope="module")
def straight(trainer: Trainer) -> dict[tuple[int, str], float]:
    recipe = trainer.recipe("straight")
    trainer.check(trainer.train(recipe), recipe)
    return trainer.metrics("straight")


def stopped_at(trainer: Trainer, name: str, step: int) -> dict[str, Any]:
    """Check that one sound checkpoint of ``step`` was left; return status.json."""
    status = trainer.status(name)
    assert (status["state"], status["exit_code"], status["step"]) == ("stopped", 75, step)
    newest = layout.newest(trainer.directory / name)
    assert newest is not None
    assert newest[0] == status["last_checkpoint_step"] == step
    assert damaged_files(newest[1]) == []
    return status


@pytest.mark.parametrize(
    ("faults", "step", "reason", "requeue"),
    [
        ("train.start:1:0:sigterm", 1, "asked to stop (another rank)", True),
        (
            "train.step:1:6:sigusr1,train.step:0:6:sigusr2,checkpoint.before_shard:*:6:sigterm",
            6, "asked to stop (SIGUSR2)", True,
        ),
        ("train.evaluation:0:5:sigusr1,train.step:1:6:sigint", 6, "asked to stop (another rank)", False),
    ],
    ids=["while starting", "two kinds, and again while saving", "while evaluating, and a person elsewhere"],
)  # fmt: skip
def test_signals_end_the_run_after_one_agreed_step(
    trainer: Trainer, straight: dict[tuple[int, str], float], faults: str, step: int, reason: str, requeue: bool
) -> None:
    name = f"signals-{step}-{requeue}"
    recipe = trainer.recipe(name)
    assert trainer.train(recipe, faults=faults) == [75, 75], recipe.with_suffix(".out").read_text()
    status = stopped_at(trainer, name, step)
    assert (status["reason"], status["requeue"]) == (reason, requeue)
    trainer.check(trainer.train(recipe), recipe)
    assert trainer.metrics(name) == straight


def commands(folder: Path, answer: str) -> str:
    """Return a PATH on which scontrol notes how it is called and then does ``answer``."""
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$*" >> {folder}/asked\n{answer}\n')
    (folder / "scontrol").chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


@pytest.mark.parametrize("source", ["environment", "scontrol"])
def test_the_time_limit_ends_the_run(trainer: Trainer, tmp_path: Path, source: str) -> None:
    end = int(time.time()) + 125  # launch.slurm.signal_seconds and a margin are kept before it
    path = commands(tmp_path / "bin", "exit 1" if source == "environment" else f"echo JobId=5_2 EndTime={end} X=Y")
    variables = {"PATH": path, "SLURM_JOB_ID": "5_2"}
    recipe = trainer.recipe(f"limit-{source}")
    soon = {"SLURM_JOB_END_TIME": str(end)} if source == "environment" else {}
    codes = trainer.train(recipe, *ENDLESS, variables=variables | soon)
    assert codes == [75, 75], recipe.with_suffix(".out").read_text()
    status = trainer.status(recipe.stem)
    assert status["reason"].startswith("time limit in "), status
    assert status["requeue"] is True
    assert time.time() < end
    asked = (tmp_path / "bin" / "asked").read_text().splitlines()
    assert asked == ["show job 5_2 -o"], "rank 0 alone asks, once"


@pytest.mark.parametrize("answer", ["exec sleep 20", "echo busy >&2; exit 1", "echo EndTime=Unknown"])
def test_a_controller_that_hangs_or_fails_does_no_harm(trainer: Trainer, tmp_path: Path, answer: str) -> None:
    path = commands(tmp_path / "bin", answer)
    recipe = trainer.recipe(f"controller-{len(answer)}")
    far = str(int(time.time()) + 9000)
    variables = {"PATH": path, "SLURM_JOB_ID": "77", "SLURM_JOB_END_TIME": far}
    trainer.check(trainer.train(recipe, "run.steps=5", variables=variables), recipe)


class Running:
    """A run that goes on until it is told otherwise, and `trainer control` for it."""

    def __init__(self, trainer: Trainer, name: str, pool: ThreadPoolExecutor, *overrides: str) -> None:
        self.directory = trainer.directory / name
        self.recipe = trainer.recipe(name)
        self.codes: Future[list[int]] = pool.submit(trainer.train, self.recipe, *ENDLESS, *overrides)

    def until(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not what():
            assert not self.codes.done(), self.recipe.with_suffix(".out").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def control(self, *arguments: object) -> tuple[int, str]:
        done = tiny.run(tiny.command("control", self.directory, *arguments), self.directory)
        return done.returncode, done.stdout + done.stderr

    def status(self) -> dict[str, Any]:
        path = self.directory / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}


def test_a_person_controls_a_run_and_ends_it_for_good(trainer: Trainer) -> None:
    with ThreadPoolExecutor(1) as pool:
        run = Running(trainer, "controlled", pool)
        try:
            run.until(lambda: run.status().get("state") == "running")
            code, said = run.control("save")
            assert code == 0, said
            saved = int(said.split()[-1])
            assert said == f"saved step {saved}\n"
            assert (layout.step_directory(run.directory, saved) / "manifest.json").exists()
            assert stat.S_IMODE(control_path(run.directory).stat().st_mode) == 0o600
            assert run.control("stop-after", 1)[0] == 1
            code, said = run.control("stop-after", 900_000)
            assert (code, said, run.status()["stop_step"]) == (0, "stopping after step 900000\n", 900_000)
            assert run.control("log-level", "debug")[0] == 0
            # A file that others may write is passed over.
            write_command(run.directory, new_command("stop"))
            control_path(run.directory).chmod(0o666)
            run.until(lambda: "control.json is ignored" in run.recipe.with_suffix(".out").read_text())
        finally:
            code, said = run.control("stop")
        assert code == 0, said
        assert run.codes.result(timeout=120) == [75, 75]
    status = run.status()
    assert status["requeue"] is False
    assert status["reason"].startswith("trainer control stop by ")
    assert status["stop_step"] == 900_000, "that one is still to be done"
    assert run.control("save")[0] == 2, "nobody is there to answer"
    # The same command was done with: the next start is not stopped again.
    last = status["step"]
    steps = f"run.steps={last + 3}"
    trainer.check(trainer.train(run.recipe, steps), run.recipe)
    done = read_done(run.directory)
    assert done is not None
    assert (done.step, done.attempt) == (last + 3, 2)
    # A finished run: every rank ends by itself, with nothing started.
    assert trainer.train(run.recipe, steps) == [0, 0]
    assert "already finished" in run.recipe.with_suffix(".out").read_text()
    assert run.status()["attempt"] == 2
    # A stop file keeps it from going on, and is removed by hand.
    stop_path(run.directory).touch()
    more = f"run.steps={last + 5}"
    assert trainer.train(run.recipe, more) == [93, 93]
    assert "remove it to continue" in run.recipe.with_suffix(".out").read_text()
    stop_path(run.directory).unlink()
    trainer.check(trainer.train(run.recipe, more), run.recipe)
    done = read_done(run.directory)
    assert done is not None
    assert done.step == last + 5
    # Its checkpoints are gone: that is no reason to train it anew.
    layout.checkpoints_directory(run.directory).rename(run.directory / "lost")
    assert trainer.train(run.recipe, more) == [2, 2]
    assert "there is no checkpoint any more" in run.recipe.with_suffix(".out").read_text()
    assert done_path(run.directory).exists()


def test_a_stop_file_ends_a_run_and_stop_after_ends_it_exactly(trainer: Trainer) -> None:
    with ThreadPoolExecutor(1) as pool:
        run = Running(trainer, "filed", pool)
        run.until(lambda: run.status().get("state") == "running")
        stop_path(run.directory).touch()
        assert run.codes.result(timeout=120) == [75, 75]
    status = run.status()
    assert (status["requeue"], status["reason"]) == (False, f"stop file {stop_path(run.directory)}")
    stop_path(run.directory).unlink()
    last = status["step"] + 4
    write_command(run.directory, new_command("stop-after", last))  # before the start, so that the step is certain
    assert trainer.train(run.recipe, *ENDLESS) == [75, 75]
    status = stopped_at(trainer, "filed", last)
    assert (status["requeue"], status["reason"]) == (False, f"trainer control stop-after {last}")
    trainer.check(trainer.train(run.recipe, f"run.steps={last + 2}"), run.recipe)
    assert run.status()["stop_step"] is None
