"""A run that is killed goes on as if nothing had happened: same losses to the last bit, same sizes or others.

Each run is a process group of its own, forked from one that has imported torch (tests/distributed/zygote.py).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from forked_runs import STEPS, Trainer, exact_lines
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.data.shards import ShardWriter


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    with Trainer(tmp_path_factory.mktemp("resume")) as made:
        yield made


BASES = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload_param", "hpz", "muon", "adagrad"]
DTYPES = ["float32", "bfloat16"]
# Each with one dtype in turn; with the other one in the sweep.
RESUMED = [
    pytest.param(base, dtype, marks=[pytest.mark.sweep] if (i + j) % 2 else [])
    for i, base in enumerate(BASES)
    for j, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize(("base", "dtype"), RESUMED)
def test_killed_and_resumed_equals_undisturbed(trainer: Trainer, base: str, dtype: str) -> None:
    run = f"{base}-{dtype}"
    deepspeed: dict[str, Any] = {"base": base}
    if base == "hpz":
        deepspeed = {"base": "zero3", "override": {"zero_optimization": {"zero_hpz_partition_size": 2}}}
    settings = {"model": {"dtype": dtype}, "deepspeed": deepspeed}
    if base in ("muon", "adagrad"):
        settings |= {"deepspeed": {"base": "zero1"}, "optimizer": {"name": base}}
    straight = trainer.recipe(f"{run}-straight", **settings)
    trainer.check(trainer.train(straight), straight)
    killed = trainer.recipe(f"{run}-killed", **settings)
    assert trainer.train(killed, faults="train.step:*:13:kill") == [-9, -9]
    assert max(step for step, _ in trainer.metrics(f"{run}-killed")) >= 12
    # The supervisor of rank 0 says "failed" where it is not killed before it can.
    assert trainer.status(f"{run}-killed")["state"] in ("running", "failed")
    trainer.check(trainer.train(killed), killed)
    assert trainer.metrics(f"{run}-killed") == trainer.metrics(f"{run}-straight")
    status = trainer.status(f"{run}-killed")
    assert (status["state"], status["step"], status["restarts"], status["resumed_step"]) == ("finished", STEPS, 1, 10)


@pytest.mark.parametrize(("base", "world"), [("zero3", 1), ("zero1", 4), ("zero0", 1), ("zero2_offload", 2)])
def test_a_zero2_checkpoint_of_two_ranks_resumes_at_another_shape(trainer: Trainer, base: str, world: int) -> None:
    # dropout off: another number of ranks draws other masks
    source = trainer.recipe("zero2-source", dropout=0.0, deepspeed={"base": "zero2"})
    if not (trainer.directory / "zero2-source").exists():
        trainer.check(trainer.train(source), source)
    run = f"reshaped-{base}-{world}"
    target = trainer.directory / run
    shutil.copytree(trainer.directory / "zero2-source", target)
    shutil.rmtree(target / "checkpoints" / f"step-{STEPS:08d}")
    recipe = trainer.recipe(run, dropout=0.0, deepspeed={"base": base})
    trainer.check(trainer.train(recipe, world=world), recipe)
    expected, found = trainer.metrics("zero2-source"), trainer.metrics(run)
    assert found.keys() == expected.keys()
    assert max(abs(found[key] - expected[key]) for key in expected) < 1e-5
    assert trainer.status(run)["resumed_step"] == 10


WARMUP = {"global_size": 12, "micro_size": 2, "warmup": {"start_size": 4, "increment": 4, "steps": 16}}
"""Eight steps of 4 sequences, eight of 8, then 12: the checkpoint of step 10 lies in the middle."""


@pytest.mark.parametrize(
    ("base", "dtype"),
    [("zero2", "float32"), *(pytest.param(base, "bfloat16", marks=pytest.mark.sweep) for base in ("zero0", "zero3"))],
)
def test_killed_inside_a_batch_warmup_and_resumed_equals_undisturbed(trainer: Trainer, base: str, dtype: str) -> None:
    run = f"warmup-{base}-{dtype}"
    settings: dict[str, Any] = {"model": {"dtype": dtype}, "deepspeed": {"base": base}, "batch": WARMUP}
    straight = trainer.recipe(f"{run}-straight", **settings)
    trainer.check(trainer.train(straight), straight)
    killed = trainer.recipe(f"{run}-killed", **settings)
    assert trainer.train(killed, faults="train.step:*:13:kill") == [-9, -9]
    trainer.check(trainer.train(killed), killed)
    assert trainer.status(f"{run}-killed")["resumed_step"] == 10
    assert exact_lines(trainer, f"{run}-killed") == exact_lines(trainer, f"{run}-straight")
    assert trainer.metrics(f"{run}-killed") == trainer.metrics(f"{run}-straight")
    lines = exact_lines(trainer, f"{run}-straight")
    assert [line["global_batch_size"] for line in lines] == [4] * 8 + [8] * 8 + [12] * 4
    assert [line["samples"] for line in lines[7::8]] == [32, 96]
    assert all(line["tokens"] == 32 * line["samples"] for line in lines)
    summary = (
        "12 = 2 micro x 3 accumulation x 2 ranks after a warm-up from 4 by 4 over 16 steps, 20 steps, 4.61k tokens"
    )
    assert summary in straight.with_suffix(".out").read_text()


@pytest.mark.parametrize(("base", "world", "micro"), [("zero3", 1, 2), ("zero1", 4, 1)])
def test_a_batch_warmup_goes_on_at_another_number_of_ranks(trainer: Trainer, base: str, world: int, micro: int) -> None:
    source = trainer.recipe("warmup-source", dropout=0.0, batch=WARMUP)
    if not (trainer.directory / "warmup-source").exists():
        trainer.check(trainer.train(source), source)
    run = f"warmup-{base}-{world}"
    shutil.copytree(trainer.directory / "warmup-source", trainer.directory / run)
    shutil.rmtree(trainer.directory / run / "checkpoints" / f"step-{STEPS:08d}")
    recipe = trainer.recipe(run, dropout=0.0, deepspeed={"base": base}, batch=WARMUP | {"micro_size": micro})
    trainer.check(trainer.train(recipe, world=world), recipe)
    assert trainer.status(run)["resumed_step"] == 10
    expected, found = trainer.metrics("warmup-source"), trainer.metrics(run)
    assert found.keys() == expected.keys()
    assert max(abs(found[key] - expected[key]) for key in expected) < 1e-5
    hashes = [[line["batch_hash"] for line in exact_lines(trainer, name)] for name in ("warmup-source", run)]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    "fault",
    [
        "checkpoint.before_shard:1:10:kill",
        "checkpoint.shard_written:1:10:truncate",
        "checkpoint.before_manifest:0:10:kill",
        "checkpoint.before_rename:0:10:truncate",
        "checkpoint.before_pointer:0:10:kill",
    ],
)
def test_a_kill_during_a_save_loses_nothing_that_was_committed(trainer: Trainer, fault: str) -> None:
    straight = trainer.recipe("save-straight", checkpoint={"every_steps": 5})
    if not (trainer.directory / "save-straight").exists():
        trainer.check(trainer.train(straight), straight)
    run = "save-" + fault.replace(":", "-").replace(".", "-")
    recipe = trainer.recipe(run, checkpoint={"every_steps": 5})
    codes = trainer.train(recipe, faults=fault)
    assert -9 in codes
    trainer.check(trainer.train(recipe), recipe)
    committed = 10 if "before_pointer" in fault else 5  # after the rename the new one exists, pointer or not
    assert trainer.status(run)["resumed_step"] == committed
    assert trainer.metrics(run) == trainer.metrics("save-straight")
    left = [path.name for path in (trainer.directory / run / "checkpoints").iterdir() if path.name.startswith(".")]
    assert left == []


def test_a_failed_save_is_reported_and_training_goes_on(trainer: Trainer) -> None:
    recipe = trainer.recipe("full-disk", checkpoint={"every_steps": 5})
    trainer.check(trainer.train(recipe, faults="checkpoint.before_shard:1:10:enospc"), recipe)
    assert "rank 1: rank-00001.safetensors: [Errno 28]" in recipe.with_suffix(".out").read_text()
    held = sorted(path.name for path in (trainer.directory / "full-disk" / "checkpoints").glob("step-*"))
    assert held == ["step-00000005", "step-00000015", "step-00000020"]


def test_a_damaged_checkpoint_is_passed_over(trainer: Trainer) -> None:
    recipe = trainer.recipe("damaged", checkpoint={"every_steps": 5}, run={"steps": STEPS + 5})
    trainer.check(trainer.train(recipe), recipe)
    expected = trainer.metrics("damaged")
    checkpoints = trainer.directory / "damaged" / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000025")  # or there were nothing left to do
    shard = checkpoints / "step-00000020" / "rank-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (checkpoints / "step-00000015" / "rank-00000.safetensors").unlink()
    trainer.check(trainer.train(recipe), recipe)
    assert trainer.status("damaged")["resumed_step"] == 10
    assert trainer.metrics("damaged") == expected
    output = recipe.with_suffix(".out").read_text()
    assert "passing over damaged checkpoint step-00000020" in output
    assert "rank-00001.safetensors" in output


def test_milestones_are_kept_and_old_checkpoints_go(trainer: Trainer) -> None:
    settings = {"every_steps": 2, "keep_last": 2, "keep_every_steps": 6}
    recipe = trainer.recipe("retention", checkpoint=settings)
    trainer.check(trainer.train(recipe), recipe)
    held = sorted(int(path.name[5:]) for path in (trainer.directory / "retention" / "checkpoints").glob("step-*"))
    assert held == [6, 12, 18, 20]


def test_a_finished_run_asked_for_more_steps_goes_on(trainer: Trainer) -> None:
    schedule = {"name": "constant"}
    straight = trainer.recipe("more-straight", schedule=schedule)
    trainer.check(trainer.train(straight), straight)
    recipe = trainer.recipe("more", schedule=schedule)
    trainer.check(trainer.train(recipe, "run.steps=10"), recipe)
    trainer.check(trainer.train(recipe), recipe)
    assert trainer.metrics("more") == trainer.metrics("more-straight")


def test_another_run_gives_its_weights_and_a_fresh_optimizer(trainer: Trainer) -> None:
    first = trainer.recipe("teacher")
    trainer.check(trainer.train(first), first)
    path = first.read_text()
    recipe = yaml.safe_load(path)
    recipe["run"]["directory"] = str(trainer.directory / "pupil")
    recipe["model"] = {"path": str(trainer.directory / "teacher"), "dtype": "float32"}
    target = trainer.directory / "pupil.yaml"
    target.write_text(yaml.safe_dump(recipe))
    trainer.check(trainer.train(target), target)
    start, end = trainer.metrics("pupil"), trainer.metrics("teacher")
    assert abs(start[0, "evaluation"] - end[STEPS, "evaluation"]) < 1e-6


def test_a_bad_token_on_one_rank_is_told_whichever_rank_reads_it(trainer: Trainer) -> None:
    prefix = trainer.directory / "foreign"
    with ShardWriter(prefix, 1000, end_of_document_id=0) as writer:
        # A million tokens. At the start ids are looked at in 8 places of 65,536, one every 133,494: between them one
        # document in 4 is bad.
        for number in range(15625):
            tokens = [1 + (number + 7 * i) % 511 for i in range(63)] + [0]
            if number % 4 == 0 and 66_000 < number * 64 % 133_494 < 133_000:
                tokens[30] = 777  # beyond the model's 512
            writer.add(tokens)
        writer.commit()
    prefix.with_suffix(".json").unlink()  # as Megatron writes them: nothing says beforehand what ids are inside
    told = []
    for seed in range(5):  # by the order of the seed one rank or the other meets it
        recipe = trainer.recipe(f"foreign-{seed}")
        codes = trainer.train(recipe, f"run.seed={seed}", f"data.train.0.path={prefix}")
        told.append(codes.index(2))
        output = recipe.with_suffix(".out").read_text()
        assert output.count("777") == 1, output
        assert "foreign" in output
        assert "Traceback" not in output
    assert set(told) == {0, 1}


def test_a_signal_to_one_rank_stops_all_at_the_same_step(trainer: Trainer) -> None:
    straight = trainer.recipe("signal-straight")
    trainer.check(trainer.train(straight), straight)
    recipe = trainer.recipe("signal")
    assert trainer.train(recipe, faults="train.step:1:7:signal") == [75, 75]
    status = trainer.status("signal")
    assert (status["state"], status["exit_code"], status["last_checkpoint_step"]) == ("stopped", 75, 7)
    trainer.check(trainer.train(recipe), recipe)
    assert trainer.metrics("signal") == trainer.metrics("signal-straight")


def test_a_killed_run_accounts_for_its_time(trainer: Trainer) -> None:
    """Killed in step 13, after the checkpoint of step 10: two steps are lost, and no time goes missing."""
    recipe = trainer.recipe("accounted", telemetry={"tensorboard": True})
    began = time.time()
    assert trainer.train(recipe, faults="train.step:*:13:kill") == [-9, -9]
    killed = time.time()
    trainer.check(trainer.train(recipe), recipe)
    run = trainer.directory / "accounted"
    times = [json.loads((run / "attempts" / name / "timing.json").read_text()) for name in ("0001", "0002")]
    # What rank 0 could no longer write of steps 11 and 12 was taken from metrics.jsonl before that was cut.
    assert [(one["resumed_step"], one["last_step"]) for one in times] == [(0, 12), (10, 20)]
    assert [(one["world_size"], one["nodes"]) for one in times] == [(2, 1), (2, 1)]
    # "failed" where a supervisor outlived its rank for long enough to say why.
    assert times[0]["outcome"] in (None, "failed")
    assert times[1]["outcome"] == "finished"
    assert times[0]["restore_seconds"] == 0 < times[1]["restore_seconds"]
    assert began < times[0]["started_unix"] < times[0]["first_step_unix"] < times[0]["last_step_unix"] < killed
    assert times[0]["evaluation_seconds"] > times[0]["first_evaluation_seconds"] > 0
    assert times[1]["first_evaluation_seconds"] == 0
    assert times[1]["saves"] == 1
    report = json.loads((run / "report.json").read_text())
    found = report["goodput"]
    assert (found["restarts"], found["steps"], found["lost_steps"]) == (1, STEPS, 2)
    lines = [line for line in map(json.loads, (run / "metrics.jsonl").open()) if "kind" not in line]
    assert found["productive_seconds"] == pytest.approx(sum(line["step_seconds"] for line in lines))
    first, second = report["attempts"]
    kept = sum(line["step_seconds"] for line in lines if line["step"] <= 10)
    assert first["redone_seconds"] == pytest.approx(times[0]["step_seconds"] - kept)
    assert 0 < first["redone_seconds"] < times[0]["step_seconds"]
    parts = ("productive", "startup", "restore", "redone", "evaluation", "save", "other")
    for attempt in (first, second):
        assert sum(attempt[f"{part}_seconds"] for part in parts) == pytest.approx(attempt["allocated_seconds"])
        assert all(attempt[f"{part}_seconds"] > 0 for part in ("productive", "startup", "evaluation"))
    assert found["allocated_seconds"] + found["waiting_seconds"] == pytest.approx(report["wall_seconds"])
    assert report["wall_seconds"] <= times[1]["ended_unix"] - began
    assert trainer.status("accounted")["goodput"]["lost_steps"] == 2
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    drawn = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert drawn["goodput/lost_steps"] == [(10, 0.0), (20, 2.0)]
    assert drawn["goodput/restarts"] == [(10, 0.0), (20, 1.0)]
    assert drawn["goodput/fraction"][1][1] == pytest.approx(found["fraction"], rel=0.1)
    assert drawn["goodput/restore_seconds"][1][1] == pytest.approx(times[1]["restore_seconds"])
    said = recipe.with_suffix(".out").read_text()
    assert said.count("restarts    1, 2 steps lost") == 1
    assert "1: steps 1-12, 2 lost" in said
