"""Ranks that are stopped, crash, hang or raise: the job ends, and one summary names rank, host, phase and cause."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import little_memory
import packages
import pytest
from fault_sweep import KINDS, WATCHDOG, Injection, draw, faults_of, inject
from forked_runs import Trainer

SEED = 20
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    with Trainer(tmp_path_factory.mktemp("watchdog")) as made:
        yield made


@pytest.mark.parametrize("injection", draw(SEED, 2, KINDS), ids=lambda injection: injection.fault)
def test_the_summary_names_rank_host_phase_and_kind(trainer: Trainer, injection: Injection) -> None:
    name = injection.fault.replace(":", "-")
    found = inject(trainer, injection, 2, name)
    assert faults_of(injection, found) == [], found
    assert found["fix"]
    run = trainer.directory / name
    # What all ranks did, with the Python stacks of those that could still be asked, or what they raised.
    reports = run / "failures" / found["launch"]
    assert sorted(path.name for path in reports.glob("rank-*.json")) == ["rank-00000.json", "rank-00001.json"]
    for rank in (0, 1):
        if rank != injection.rank or injection.kind != "exit":
            assert "most recent call" in (reports / f"rank-{rank:05d}.stacks.txt").read_text()
    if injection.step > 3:  # ranks were compared after step 2
        line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert line.get("kind") == "evaluation" or line["slowest_rank_seconds"] >= line["median_rank_seconds"] > 0
    # Told once, and status.json says it where rank 0 had no words of its own.
    said = (trainer.directory / f"{name}.out").read_text()
    assert said.count(f"trainer: {found['class']}: ") == 1
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert injection.kind == "raise" or status["reason"] == found["cause"]


def test_the_watchdog_reads_nothing_of_the_injector() -> None:
    judges = [*(REPOSITORY / "trainer" / "resilience").glob("*.py")]
    judges += [REPOSITORY / "trainer" / "launch" / f"{name}.py" for name in ("supervisor", "rank_examiner", "failure")]
    for path in judges:
        assert "faults" not in path.read_text().replace("def faults", ""), path


def test_the_micro_batch_of_a_pipeline_stage_is_named(trainer: Trainer) -> None:
    recipe = trainer.recipe(
        "staged", resilience={"watchdog": WATCHDOG}, run={"steps": 6}, evaluation={"every_steps": 2, "batches": 1},
        batch={"global_size": 8, "micro_size": 2}, parallel={"pipeline": 2},
    )  # fmt: skip
    # In the third backward pass of step 3.
    codes = trainer.train(recipe, faults="micro.backward:0:3:stop", grace_seconds=8.0, before="strike_third")
    said = recipe.with_suffix(".out").read_text()
    assert 0 not in codes, said
    found = json.loads((trainer.directory / "staged" / "failure.json").read_text())
    assert (found["class"], found["rank"], found["phase"], found["step"]) == ("stopped", 0, "backward", 3), found
    assert "micro-batch 2" in found["cause"], found


def test_a_rank_that_the_kernel_kills_for_memory(trainer: Trainer) -> None:
    place = little_memory.parent()
    if place is None:
        packages.give_up("control groups of memory can't be made here")
    recipe = trainer.recipe("flooded", resilience={"watchdog": WATCHDOG}, run={"steps": 6})
    group = str(os.getpid())
    fault = {"faults": "phase.backward:1:3:flood", "before": "little_memory", "variables": {"GROUP": group}}
    try:
        codes = trainer.train(recipe, **fault, grace_seconds=8.0)
    finally:
        for made in place[0].glob(f"trainer-test-{group}-*"):
            made.rmdir()
    said = recipe.with_suffix(".out").read_text()
    assert 0 not in codes, said
    found = json.loads((trainer.directory / "flooded" / "failure.json").read_text())
    assert (found["class"], found["rank"], found["phase"]) == ("host-out-of-memory", 1, "backward"), found
    assert "SIGKILL" in found["cause"], found
    assert found["fix"]


def test_an_exception_before_there_is_a_log_is_named(trainer: Trainer) -> None:
    injection = Injection("raise", "start", 0, 0, "exception")
    found = inject(trainer, injection, 1, "early")
    assert faults_of(injection, found) == [], found
    assert "injected at phase.start" in found["cause"]
