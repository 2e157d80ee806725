"""What a manifest tells of another optimizer and other frozen parameters, and what of a recipe is shown as changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.checkpoint.changes import Changes, some_of, training_changes
from trainer.checkpoint.differences import library_differences, recipe_differences, shape_difference
from trainer.checkpoint.identity import data_differences, data_identity
from trainer.config.optimizer import OptimizerConfig
from trainer.config.run import Recipe
from trainer.optim.groups import group_settings
from trainer.optim.table import TABLE

pytestmark = pytest.mark.fast

SHAPES = {
    "model.embed_tokens.weight": [64, 16],
    "model.layers.0.mlp.gate_proj.weight": [32, 16],
    "model.layers.0.experts.gate_up_proj": [4, 16, 32],
    "model.layers.0.input_layernorm.weight": [16],
    "model.norm.weight": [16],
}
BUFFER = "model.layers.0.gate.e_score_correction_bias"
CHOICES: list[dict[str, Any]] = [
    {"name": "adamw"},
    {"name": "lion"},
    {"name": "adagrad"},
    {"name": "muon"},
    {"name": "sgd"},
    {"name": "sgd", "momentum": 0.9},
]


def recipe_of(**sections: Any) -> Recipe:
    values: dict[str, Any] = {
        "run": {"directory": "runs/x", "steps": 4},
        "model": {"config": {"model_type": "llama"}},
        "data": {"train": [{"path": "a"}], "sequence_length": 16},
        "batch": {"global_size": 2},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return Recipe.model_validate(values)


def manifest_of(optimizer: dict[str, Any], frozen: tuple[str, ...] = (), *, old: bool = False) -> dict[str, Any]:
    config = OptimizerConfig.model_validate(optimizer)
    tensors: dict[str, Any] = {BUFFER: {"shape": [4], "states": {"weight": {}}}}
    for name, shape in SHAPES.items():
        orthogonal = group_settings(name, len(shape), config).orthogonal
        keys = [] if name in frozen else list(TABLE[config.name].torch_state_keys(config, orthogonal))
        tensors[name] = {"shape": shape, "states": {key: {} for key in ("weight", *keys)}}
    named = {} if old else {"optimizer": {"name": config.name}, "frozen": sorted(frozen)}
    return {"tensors": tensors, **named}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("then", CHOICES, ids=str)
@pytest.mark.parametrize("now", CHOICES, ids=str)
def test_every_pair_of_optimizers(then: dict[str, Any], now: dict[str, Any], old: bool) -> None:
    changes = training_changes(manifest_of(then, old=old), recipe_of(optimizer=now), "x")
    assert changes.frozen == ()
    if then == now:
        assert changes == Changes()
        return
    (problem,) = changes.optimizer
    same_name = then["name"] == now["name"]
    assert problem.key == ("optimizer.momentum" if same_name else "optimizer.name")
    words = "no state of an optimizer," if old and then == {"name": "sgd"} else f"the state of {then['name']} ("
    assert ("SGD" if same_name else f"x holds {words}") in problem.rule


@pytest.mark.parametrize("now", CHOICES[:4], ids=str)
def test_weights_alone_of_a_run_that_named_its_optimizer(now: dict[str, Any]) -> None:
    manifest = manifest_of({"name": "adamw"})
    for entry in manifest["tensors"].values():
        entry["states"] = {"weight": {}}
    (problem,) = training_changes(manifest, recipe_of(optimizer=now), "x").optimizer
    assert problem.rule == "x holds weights only, no state of an optimizer"


def test_what_an_imported_checkpoint_has_read_is_one_question() -> None:
    expected = data_identity(recipe_of(), "fingerprint")
    (problem,) = data_differences({}, expected, "x")
    assert problem.rule == "which data x was trained on is not known: it was imported"
    assert data_differences(expected, expected, "x") == []
    assert [p.key for p in data_differences(expected | {"run.seed": -1}, expected, "x")] == ["run.seed"]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("optimizer", CHOICES[:4], ids=str)
def test_frozen_parameters_are_told_from_trained_ones_and_buffers(optimizer: dict[str, Any], old: bool) -> None:
    norm = "model.norm.weight"
    kept = recipe_of(optimizer=optimizer, model={"freeze": [r"^model\.norm"]})
    assert training_changes(manifest_of(optimizer, (norm,), old=old), kept, "x") == Changes()
    thawed = training_changes(manifest_of(optimizer, (norm,), old=old), recipe_of(optimizer=optimizer), "x")
    assert (thawed.newly_trained, thawed.newly_frozen, thawed.optimizer) == ({norm}, frozenset(), ())
    assert "1 parameter (model.norm.weight) becomes trained" in thawed.frozen[0].rule
    froze = training_changes(
        manifest_of(optimizer, old=old), recipe_of(optimizer=optimizer, model={"freeze": ["layers.0"]}), "x"
    )
    assert froze.newly_frozen == {name for name in SHAPES if "layers.0" in name}
    assert "3 parameters (" in froze.frozen[0].rule


def test_an_old_manifest_does_not_take_a_buffer_for_a_parameter_unless_an_engine_says_so() -> None:
    experts = "model.layers.0.experts.gate_up_proj"
    manifest = manifest_of({"name": "adamw"}, (experts,), old=True)
    assert training_changes(manifest, recipe_of(), "x").newly_trained == frozenset()
    assert training_changes(manifest, recipe_of(), "x", {experts}).newly_trained == {experts}
    assert training_changes(manifest, recipe_of(), "x", set()).newly_trained == frozenset()


def test_muon_on_other_matrices_is_another_state() -> None:
    manifest = manifest_of({"name": "muon"})
    states = manifest["tensors"]["model.layers.0.mlp.gate_proj.weight"]["states"]
    states.pop("momentum")
    states |= {"exp_avg": {}, "exp_avg_sq": {}}
    (problem,) = training_changes(manifest, recipe_of(optimizer={"name": "muon"}), "x").optimizer
    assert "x holds other state than muon keeps of 1 parameter (model.layers.0.mlp.gate_proj.weight)" in problem.rule


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, JSON, JSON, JSON)
def test_a_manifest_may_hold_anything(tensors: Any, entry: Any, optimizer: Any, frozen: Any) -> None:
    for value in (tensors, {"a": entry}, {"a": {"shape": entry, "states": {"weight": {}}}}):
        manifest = {"tensors": value, "optimizer": optimizer, "frozen": frozen, "topology": entry, "model": optimizer}
        training_changes(manifest, recipe_of(), "x")
        shape_difference(manifest, {"world_size": 2, "zero_stage": 1}, "bfloat16")
    recipe_differences(tensors, recipe_of())
    recipe_differences({"run": entry, "model": tensors}, recipe_of())
    library_differences(entry, {"torch": "2.9.0"})


def test_names_are_cut_and_counted() -> None:
    assert some_of(["b", "a"]) == "2 parameters (a, b)"
    assert some_of("edcba") == "5 parameters (a, b, c and 2 more)"


def test_a_recipe_is_compared_key_by_key() -> None:
    then = recipe_of(optimizer={"learning_rate": 1e-3}, telemetry={"tensorboard": False})
    stored = then.model_dump(mode="json")
    assert recipe_differences(copy.deepcopy(stored), then) == []
    moved = recipe_of(optimizer={"learning_rate": 1e-3}, run={"directory": "runs/y"}, launch={"processes": 2})
    assert recipe_differences(stored, moved) == []
    now = recipe_of(data={"train": [{"path": "a", "weight": 2.0}, {"path": "b"}]}, model={"freeze": ["norm"]})
    lines = recipe_differences(stored, now)
    assert "optimizer.learning_rate: 0.001 -> 0.0003" in lines
    assert "data.train.0.weight: null -> 2.0" in lines
    assert 'data.train.1.path: null -> "b"' in lines
    assert len([line for line in lines if "data.train.1" in line]) == 1
    assert 'model.freeze: [] -> ["norm"]' in lines
    stored["optimizer"].pop("clip_norm")  # of a trainer that did not have the key
    assert not [line for line in recipe_differences(stored, now) if "clip_norm" in line]
    stored["optimizer"]["of_old"] = 1  # and one that had a key more
    assert "optimizer.of_old: 1 -> null" in recipe_differences(stored, now)
    assert recipe_differences(None, now) == []


def test_secrets_are_not_shown() -> None:
    config = {"model_type": "llama", "api_key": "abcdef0123456789"}
    now = recipe_of(model={"config": config})
    shown = "\n".join(recipe_differences(recipe_of().model_dump(mode="json"), now))
    assert "model.config.api_key" in shown
    assert "abcdef" not in shown


def test_libraries_are_compared_by_major_and_minor_version() -> None:
    then = {"torch": "2.8.1+cu128", "deepspeed": "0.18.2", "transformers": None, "trainer": "0.1.0"}
    assert library_differences(then, {"torch": "2.8.0", "deepspeed": "0.18.9", "transformers": "5.0.0"}) is None
    said = library_differences(then, {"torch": "2.9.0", "deepspeed": "0.18.2", "gone": None})
    assert said == "other versions than the checkpoint's: torch 2.8.1+cu128 -> 2.9.0"
    assert library_differences(None, {"torch": "2.9.0"}) is None


def test_shapes_are_said_in_one_line() -> None:
    then = {"world_size": 2, "zero_stage": 2, "pipeline": 1, "tensor": 1, "data": 2}
    now = {"world_size": 4, "zero_stage": 1, "pipeline": 2, "tensor": 1, "data": 2}
    manifest: dict[str, Any] = {"topology": then, "world_size": 2, "model": {"dtype": "float32"}}
    assert shape_difference(manifest, then, "float32") is None
    said = shape_difference(manifest, now, "float32")
    assert said == "resuming a checkpoint of ZeRO-2 x 2 ranks as ZeRO-1 x 4 ranks (pipeline 2)"
    said = shape_difference(manifest, then, "bfloat16")
    assert said == "resuming a checkpoint of ZeRO-2 x 2 ranks in float32 as ZeRO-2 x 2 ranks in bfloat16"
    said = shape_difference({"world_size": 1}, now, "float32")
    assert said == "resuming a checkpoint of 1 rank as ZeRO-1 x 4 ranks (pipeline 2)"
    assert shape_difference({"world_size": 4}, now, "float32") is None
