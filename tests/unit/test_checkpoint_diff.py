"""Manifests compared field by field; what survey and prune make of directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoint import layout
from trainer.checkpoint.diff import manifest_differences
from trainer.checkpoint.locate import locate
from trainer.checkpoint.prune import plan_prune
from trainer.checkpoint.report import survey_lines
from trainer.checkpoint.survey import shape_text, survey
from trainer.core.errors import RefusedError

pytestmark = pytest.mark.fast


def commit(run: Path, step: int, **fields: Any) -> Path:
    directory = layout.step_directory(run, step)
    directory.mkdir(parents=True)
    (directory / "weights.safetensors").write_bytes(b"12345")
    files = {"weights.safetensors": {"bytes": 5, "xxh3_64": "0123456789abcdef"}}
    manifest = {"format": layout.FORMAT, "version": 1, "step": step, "files": files, **fields}
    layout.manifest_path(directory).write_text(json.dumps(manifest))
    return directory


def sound(_: Path) -> list[str]:
    return []


def test_fields_that_differ() -> None:
    old = {"step": 1, "recipe": {"a": {"b": 1, "c": [1, 2]}}, "created_unix": 1.0, "files": {"x": 1}, "frozen": []}
    new = {"step": 2, "recipe": {"a": {"b": 1.5, "c": [1, 3]}}, "created_unix": 2.0, "files": {}, "model": {"d": None}}
    assert manifest_differences(old, old) == []
    assert manifest_differences(old, new) == [
        "frozen: [] -> (none)",
        "model: (none) -> {\"d\": null}",
        "recipe.a.b: 1 -> 1.5",
        "recipe.a.c.1: 2 -> 3",
        "step: 1 -> 2",
    ]  # fmt: skip
    assert manifest_differences({"a": True}, {"a": 1}) == ["a: true -> 1"]
    assert manifest_differences({"a": [1]}, {"a": [1, 2]}) == ["a: [1] -> [1, 2]"]


def test_shapes_as_text() -> None:
    assert shape_text(None, None) == "?"
    assert shape_text(2, None) == "2"
    topology = {"pipeline": 2, "tensor": 2, "sequence": 1, "expert": 1, "data": 2, "zero_stage": 1}
    assert shape_text(8, topology) == "8 (pipeline 2 x tensor 2), ZeRO-1"
    assert shape_text(8, topology | {"pipeline": 1, "tensor": 1}) == "8, ZeRO-1"


def test_survey_of_checkpoints_of_older_trainers_and_of_ruins(tmp_path: Path) -> None:
    commit(tmp_path, 5)
    commit(tmp_path, 6, version=99)
    commit(tmp_path, 7, version="x")
    (layout.step_directory(tmp_path, 8)).mkdir()
    found = survey(tmp_path)
    assert [(held.step, held.complete, held.newer) for held in found.checkpoints] == [
        (5, True, False), (6, False, True), (7, False, False), (8, False, False),
    ]  # fmt: skip
    assert found.pointer_problem == "latest: No such file or directory"
    lines = "\n".join(survey_lines(found, 0.0))
    assert "of a newer version" in lines
    assert "no format version is 'x'" in lines
    assert "manifest.json is missing" in lines


def test_prune_never_deletes_the_newest_sound_one(tmp_path: Path) -> None:
    for step in range(1, 7):
        commit(tmp_path, step, recipe={"checkpoint": {"keep_last": 2, "keep_every_steps": 3}})
    pruning = plan_prune(tmp_path, None, None, sound)
    assert ([held.step for held in pruning.delete], pruning.keep) == ([1, 2, 4], (3, 5, 6))
    broken = {f"step-{step:08d}" for step in (3, 5, 6)}
    pruning = plan_prune(tmp_path, 1, None, lambda path: ["x"] * (path.name in broken))
    assert ([held.step for held in pruning.delete], pruning.keep) == ([1, 2], (4,))
    assert pruning.damaged == ((3, "x"), (5, "x"), (6, "x"))
    pruning = plan_prune(tmp_path, 1, None, lambda _: ["x"])
    assert (pruning.delete, pruning.keep, len(pruning.damaged)) == ((), (), 6)


def test_prune_keeps_the_best_where_the_recipe_does(tmp_path: Path) -> None:
    state = {"train": {"best": {"step": 2}}}
    for step in range(1, 5):
        commit(tmp_path, step, state=state, recipe={"checkpoint": {"keep_best": True}})
    assert plan_prune(tmp_path, 1, None, sound).keep == (2, 4)
    assert [held.step for held in survey(tmp_path).checkpoints if held.best] == [2]
    commit(tmp_path, 5, state=state, recipe={"checkpoint": {"keep_best": False}})
    assert plan_prune(tmp_path, 1, None, sound).keep == (5,)


def test_prune_keeps_what_a_newer_trainer_wrote(tmp_path: Path) -> None:
    for step, version in ((1, 1), (2, 1), (3, 99)):
        commit(tmp_path, step, version=version)
    pruning = plan_prune(tmp_path, 1, 100, sound)
    assert ([held.step for held in pruning.delete], pruning.keep) == ([1], (2, 3))


def test_places_that_users_name(tmp_path: Path) -> None:
    older, newer = commit(tmp_path / "run", 5), commit(tmp_path / "run", 6)
    assert locate(str(tmp_path / "run"), "A") == newer
    assert locate(f"{tmp_path}/run@5", "A") == older
    assert locate(str(older), "A") == older
    at = commit(tmp_path / "odd@6", 7)
    assert locate(f"{tmp_path}/odd@6", "A") == at
    for bad in ("run@7", "run@-5", "run@", "other", "other@5"):
        with pytest.raises(RefusedError):
            locate(f"{tmp_path}/{bad}", "A")
