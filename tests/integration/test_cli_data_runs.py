"""Runs whose data are mixed, masked, changed or damaged, through the command line."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny import END_OF_DOCUMENT, VOCABULARY, command, run, write_recipe, write_shards, write_world

from trainer.data.shards import ShardWriter


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_world(tmp_path)
    write_shards(tmp_path / "data" / "more", tokens=6000, seed=7)
    return tmp_path


def trainer(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run(command(*arguments), cwd)


def steps(world: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (world / name / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "kind" not in line]


def recipe(world: Path, name: str, **sections: Any) -> Path:
    where = {"directory": name, "steps": 4, **sections.pop("run", {})}
    return write_recipe(world, f"{name}.yaml", run=where, **sections)


TWO = [{"path": "data/train", "weight": 3}, {"path": "data/more"}]


def test_every_step_of_a_mixed_masked_packed_run_is_in_the_ledger(world: Path) -> None:
    stages = [{"after_tokens": 2 * 8 * 32, "weights": {"more": 1}}]
    data = {"train": TWO, "stages": stages, "packing": "best_fit", "mask_documents": True}
    done = trainer("train", recipe(world, "mix", data=data), cwd=world)
    assert done.returncode == 0, done.stderr
    logged = steps(world, "mix")
    assert [line["sources"]["train"]["loss"] is None for line in logged] == [False, False, True, True]
    assert [line["sources"]["train"]["fraction"] for line in logged] == [0.75, 0.75, 0.5, 0.375]
    for line in logged:
        answer = trainer("data", "which", "mix", "--step", str(line["step"]), "--json", cwd=world)
        found = json.loads(answer.stdout)
        assert found["batch_hash"] == line["batch_hash"]
        names = {sample["source"] for sample in found["samples"]}
        assert names == ({"train", "more"} if line["step"] <= 2 else {"more"})
    assert line["target_tokens"] < 4 * 8 * 32, "padding and first tokens of documents are no targets"


def test_the_ledger_follows_a_changed_batch_and_looks_ahead(world: Path) -> None:
    assert trainer("train", recipe(world, "grow"), cwd=world).returncode == 0
    thinned = {"log_every_steps": 3}
    more = recipe(world, "grow", run={"steps": 7}, batch={"global_size": 16}, telemetry=thinned)
    assert trainer("train", more, cwd=world).returncode == 0
    logged = {line["step"]: line for line in steps(world, "grow")}
    assert 5 not in logged, "a step between two logged ones"
    for step, first in ((4, 24), (5, 32), (6, 48), (7, 64), (9, 96)):
        found = trainer("data", "which", "grow", "--step", str(step), "--json", cwd=world)
        assert json.loads(found.stdout)["samples"][0]["sample"] == first
        assert step not in logged or json.loads(found.stdout)["batch_hash"] == logged[step]["batch_hash"]
        assert ("the run ends at step 7" in found.stderr) == (step == 9)


def test_the_ledger_follows_a_batch_warmup(world: Path) -> None:
    batch = {"global_size": 8, "micro_size": 1, "warmup": {"start_size": 2, "increment": 2, "steps": 6}}
    assert trainer("train", recipe(world, "warm", run={"steps": 8}, batch=batch), cwd=world).returncode == 0
    metrics = world / "warm" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    logged = steps(world, "warm")
    assert [line["global_batch_size"] for line in logged] == [2, 2, 4, 4, 6, 6, 8, 8]
    for kept in (lines, [*lines[:2], lines[-1]], []):  # all logged, thinned out, nothing: the recipe alone
        metrics.write_text("".join(f"{line}\n" for line in kept))
        for line in logged:
            found = json.loads(
                trainer("data", "which", "warm", "--step", str(line["step"]), "--json", cwd=world).stdout
            )
            assert found["batch_hash"] == line["batch_hash"], (len(kept), line["step"])
            assert len(found["samples"]) == line["global_batch_size"]
            assert found["samples"][-1]["sample"] == line["samples"] - 1


def test_a_resume_with_other_data_is_refused_and_may_be_accepted(world: Path) -> None:
    checkpoint = {"every_steps": 2}
    assert trainer("train", recipe(world, "run", checkpoint=checkpoint), cwd=world).returncode == 0
    changed = recipe(world, "run", run={"steps": 6}, checkpoint=checkpoint, data={"train": TWO})
    done = trainer("train", changed, cwd=world)
    assert done.returncode == 2
    assert "checkpoint.accept_changes: [data]" in done.stderr
    assert len(steps(world, "run")) == 4
    done = trainer("train", changed, "checkpoint.accept_changed_data=true", cwd=world)
    assert done.returncode == 0, done.stderr
    assert "accepted (checkpoint.accept_changes: [data]): data.train" in done.stdout + done.stderr
    assert done.stdout.count("checkpoint.accept_changed_data is an old name") == 1
    assert steps(world, "run")[-1]["samples"] == 48


def test_a_stage_ahead_may_be_added_at_a_resume(world: Path) -> None:
    assert trainer("train", recipe(world, "run"), cwd=world).returncode == 0
    train = [{"path": "data/train"}, {"path": "data/more", "weight": 0}]
    stages = [{"after_tokens": 4 * 8 * 32, "weights": {"more": 1}}]
    later = recipe(world, "run", run={"steps": 6}, data={"train": train, "stages": stages})
    done = trainer("train", later, cwd=world)
    assert done.returncode == 0, done.stderr
    assert [line["sources"]["train"]["loss"] for line in steps(world, "run")[4:]] == [None, None]


def test_a_run_longer_than_its_budgets_is_refused(world: Path) -> None:
    data = {"train": [{"path": "data/train", "tokens": 20 * 32}]}
    done = trainer("train", recipe(world, "run", data=data), cwd=world)
    assert done.returncode == 2
    assert "add up to 20" in done.stderr
    assert "set run.steps to 3" in done.stderr
    assert trainer("train", recipe(world, "run", run={"steps": 3}, data=data), cwd=world).returncode == 0
    batch = {"global_size": 8, "micro_size": 1, "warmup": {"start_size": 2, "increment": 2, "steps": 4}}
    done = trainer("train", recipe(world, "warm", run={"steps": 6}, data=data, batch=batch), cwd=world)
    assert done.returncode == 2
    assert "reads 30 sequences" in done.stderr, "2 + 2 + 4 + 6 + 8 + 8"
    assert "set run.steps to 5" in done.stderr


def test_a_corrupt_block_stops_a_run_or_is_left_out(world: Path) -> None:
    with ShardWriter(
        world / "data" / "worn", VOCABULARY, end_of_document_id=END_OF_DOCUMENT, block_bytes=512
    ) as shards:
        shards.add(np.append(np.random.default_rng(0).integers(1, VOCABULARY, 4 * 8 * 32), END_OF_DOCUMENT))
    with open(world / "data" / "worn.bin", "r+b") as file:
        file.seek(700)
        file.write(b"\x01")
    data = {"train": [{"path": "data/worn"}], "integrity": "full"}
    done = trainer("train", recipe(world, "stop", data=data), cwd=world)
    assert done.returncode == 2
    assert "worn.bin bytes 512..1024 (block 1) has checksum" in done.stderr
    done = trainer("train", recipe(world, "skip", data=data | {"on_corrupt": "skip"}), cwd=world)
    assert done.returncode == 0, done.stderr
    last = steps(world, "skip")[-1]
    # 256 tokens in a block of 512 bytes: 8 whole sequences, and the one whose last target lies in it.
    assert last["corrupt_samples"] == 9
    assert last["target_tokens"] == (4 * 8 - 9) * 32


def test_a_model_that_does_not_heed_positions_is_refused(world: Path) -> None:
    bloom = {"model_type": "bloom", "vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 1, "n_head": 2}
    path = recipe(world, "run", data={"mask_documents": True})
    mapping = yaml.safe_load(path.read_text())
    mapping["model"] |= {"config": bloom, "attention": "eager"}
    path.write_text(yaml.safe_dump(mapping))
    done = trainer("train", path, cwd=world)
    assert done.returncode == 2
    assert "data.mask_documents = True: bloom" in done.stderr
    assert not list((world / "run").glob("checkpoints/step-*"))
