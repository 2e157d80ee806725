"""Saves as a run sees them: in the background, into files that ranks share, with failures and a hook."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import STEPS, Trainer
from safetensors import safe_open

from trainer.checkpoint import layout
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.verify import damaged_files

EVERY = 4


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    with Trainer(tmp_path_factory.mktemp("saving")) as started:
        yield started


@pytest.fixture(scope="module")
def straight(trainer: Trainer) -> dict[tuple[int, str], float]:
    recipe = trainer.recipe("straight", checkpoint={"every_steps": EVERY})
    trainer.check(trainer.train(recipe), recipe)
    return trainer.metrics("straight")


def run(trainer: Trainer, name: str, *, faults: str = "", world: int = 2, **checkpoint: Any) -> tuple[list[int], str]:
    recipe = trainer.recipe(name, checkpoint={"every_steps": EVERY, **checkpoint})
    return trainer.train(recipe, faults=faults, world=world), recipe.with_suffix(".out").read_text()


def steps(trainer: Trainer, name: str) -> list[int]:
    return [step for step, _ in layout.step_directories(trainer.directory / name)]


def same_tensors(one: Path, other: Path) -> bool:
    first, second = CheckpointReader(one), CheckpointReader(other)
    manifest = layout.read_manifest(one) or {}
    return first.names() == second.names() and all(
        torch.equal(first.whole(name, key), second.whole(name, key))
        for name, facts in manifest["tensors"].items()
        for key in facts["states"]
    )


@pytest.mark.parametrize("files", ["rank", "node"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["waits", "background"])
def test_every_way_to_save_saves_the_same(
    trainer: Trainer, straight: dict[tuple[int, str], float], files: str, asynchronous: bool
) -> None:
    name = f"way-{files}-{asynchronous}"
    codes, output = run(trainer, name, files=files, asynchronous=asynchronous)
    assert codes == [0, 0], output
    assert trainer.metrics(name) == straight
    for step in (16, STEPS):
        found = layout.step_directory(trainer.directory / name, step)
        assert damaged_files(found) == []
        assert same_tensors(layout.step_directory(trainer.directory / "straight", step), found)
        kind = {"rank": ["rank-00000.safetensors", "rank-00001.safetensors"], "node": ["node-00000.safetensors"]}
        assert sorted(path.name for path in found.glob("*.safetensors")) == kind[files]


def test_a_shared_file_is_one_that_the_library_opens_and_a_resume_reads(trainer: Trainer) -> None:
    codes, output = run(trainer, "shared", files="node", asynchronous=True)
    assert codes == [0, 0], output
    directory = layout.step_directory(trainer.directory / "shared", STEPS)
    manifest = layout.read_manifest(directory) or {}
    assert manifest["version"] == layout.VERSION
    with safe_open(directory / "node-00000.safetensors", framework="pt") as file:
        keys = set(file.keys())
        assert {key.partition("/")[0] for key in keys} == {"rank-00000", "rank-00001"}
        torch.testing.assert_close(
            torch.cat([file.get_tensor(f"rank-0000{rank}/transformer.wte.weight::weight") for rank in (0, 1)])
            if "rank-00001/transformer.wte.weight::weight" in keys
            else file.get_tensor("rank-00000/transformer.wte.weight::weight"),
            CheckpointReader(directory).whole("transformer.wte.weight").flatten(),
            rtol=0,
            atol=0,
        )
    # One byte of one rank's section: the file is named, and the checkpoint before is taken.
    path = directory / "node-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1
    path.write_bytes(content)
    recipe = trainer.recipe("shared", checkpoint={"every_steps": EVERY, "files": "rank"})
    trainer.check(trainer.train(recipe, f"run.steps={STEPS + 4}", world=1), recipe)
    assert (
        "passing over damaged checkpoint step-00000020: node-00000.safetensors"
        in recipe.with_suffix(".out").read_text()
    )
    assert trainer.status("shared")["resumed_step"] == 16


def test_a_save_in_the_background_that_fails_is_told_and_the_next_one_tried(
    trainer: Trainer, straight: dict[tuple[int, str], float]
) -> None:
    codes, output = run(trainer, "fails", asynchronous=True, faults="checkpoint.before_shard:1:8:enospc")
    assert codes == [0, 0], output
    assert "warning: checkpoint of step 8 was not written: rank 1: rank-00001.safetensors: [Errno 28]" in output
    assert steps(trainer, "fails") == [4, 12, 16, 20]
    assert trainer.metrics("fails") == straight


@pytest.mark.parametrize("asynchronous", [False, True], ids=["waits", "background"])
def test_a_failed_save_ends_the_run_where_it_is_told_to(trainer: Trainer, asynchronous: bool) -> None:
    name = f"stops-{asynchronous}"
    fault = "checkpoint.before_shard:1:8:enospc"
    codes, output = run(trainer, name, asynchronous=asynchronous, on_error="stop", faults=fault)
    assert codes == [1, 1], output
    assert "trainer: checkpoint of step 8 was not written: rank 1: rank-00001.safetensors" in output
    assert steps(trainer, name) == [4]
    status = trainer.status(name)
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    last = max(step for step, _ in trainer.metrics(name))
    assert 8 <= last <= 12, "noticed before the next save, by all ranks at the same step"
    codes, output = run(trainer, name, asynchronous=asynchronous)
    assert codes == [0, 0], output


def test_the_last_save_must_succeed(trainer: Trainer) -> None:
    codes, output = run(trainer, "last", asynchronous=True, faults=f"checkpoint.before_shard:0:{STEPS}:enospc")
    assert codes == [1, 1], output
    assert steps(trainer, "last") == [4, 8, 12, 16]


def test_a_run_that_fails_lets_the_save_in_flight_end(trainer: Trainer) -> None:
    codes, output = run(trainer, "rescued", asynchronous=True, faults="train.step:*:9:raise")
    assert set(codes) == {1}, output
    assert steps(trainer, "rescued") == [4, 8]


def test_a_hook_runs_after_each_commit_outside_of_the_ranks(trainer: Trainer) -> None:
    command = ["sh", "-c", "echo {step} ${RANK-none} $(ls {directory}/manifest.json)"]
    codes, output = run(trainer, "hook", asynchronous=True, hook=command, every_steps=10)
    assert codes == [0, 0], output
    log = (trainer.directory / "hook" / "logs" / "hook.log").read_text().splitlines()
    place = layout.checkpoints_directory(trainer.directory / "hook")
    assert log == [f"{step} none {place / layout.step_name(step) / 'manifest.json'}" for step in (10, 20)]


def test_a_checkpoint_that_a_hook_needs_is_not_deleted(trainer: Trainer) -> None:
    command = ["sh", "-c", "sleep 2; ls {directory}/manifest.json"]
    codes, output = run(trainer, "slow-hook", keep_last=1, hook=command)
    assert codes == [0, 0], output
    assert "the hook is still busy: step 8 is passed over" in output
    log = (trainer.directory / "slow-hook" / "logs" / "hook.log").read_text()
    assert "step-00000004/manifest.json" in log
    assert "step-00000020/manifest.json" in log
    assert "No such file" not in log


def test_a_hook_that_fails_or_hangs_is_told_and_the_run_goes_on(trainer: Trainer) -> None:
    codes, output = run(trainer, "bad-hook", hook=["false"], every_steps=None)
    assert codes == [0, 0], output
    assert "checkpoint.hook failed for step 20: exit code 1" in output
    started = time.monotonic()
    codes, output = run(trainer, "hanging-hook", hook=["sleep", "600"], hook_timeout_seconds=1, every_steps=None)
    assert codes == [0, 0], output
    assert "checkpoint.hook failed for step 20: no end after 1 s" in output
    assert time.monotonic() - started < 60


def test_a_run_that_is_asked_to_stop_does_not_wait_for_its_hook(trainer: Trainer) -> None:
    started = time.monotonic()
    codes, output = run(trainer, "stopped-hook", hook=["sleep", "100"], faults="train.step:1:6:signal")
    assert codes == [75, 75], output
    assert "the hook of step 4 is still running; this run does not wait for it" in output
    assert "the hook does not run for step 6" in output
    assert trainer.status("stopped-hook")["state"] == "stopped"
    assert time.monotonic() - started < 60


def test_the_manifest_says_what_wrote_it(trainer: Trainer, straight: dict[tuple[int, str], float]) -> None:
    del straight
    path = layout.manifest_path(layout.step_directory(trainer.directory / "straight", STEPS))
    manifest = json.loads(path.read_text())
    assert manifest["topology"] == {
        "world_size": 2, "pipeline": 1, "tensor": 1, "sequence": 1, "expert": 1, "data": 2, "zero_stage": 1, "nodes": 1,
    }  # fmt: skip
    assert manifest["libraries"]["torch"] == torch.__version__
    assert manifest["recipe"]["optimizer"]["name"] == manifest["optimizer"]["name"] == "adamw"
    assert len(manifest["recipe_digest"]) == 64
    assert manifest["frozen"] == []


def test_times_of_saves_are_drawn(trainer: Trainer) -> None:
    recipe = trainer.recipe("drawn", checkpoint={"every_steps": 10, "asynchronous": True}, telemetry={})
    trainer.check(trainer.train(recipe, "telemetry.tensorboard=true"), recipe)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trainer.directory / "drawn" / "tensorboard")).Reload()
    for tag in ("checkpoint/blocked_seconds", "checkpoint/seconds", "checkpoint/bytes"):
        assert [event.step for event in events.Scalars(tag)] == [10, 20]
    status = trainer.status("drawn")
    assert status["last_checkpoint_step"] == 20
    assert status["last_checkpoint_seconds"] > 0
