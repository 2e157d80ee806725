"""Every ZeRO stage, split and dtype computes what a plain single-process loop computes; vetoes change nothing.

One process group a world size takes all cases (an engine builds in 0.3 s, a process in 6 s).
"""

from __future__ import annotations

import functools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import TESTS, run_reference, run_workers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

WORKER = TESTS / "distributed" / "engine_worker.py"
LLAMA = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
STEPS, SEQUENCES, LENGTH = 5, 8, 24
IGNORED = 7
"""Targets of this id don't count: rows then have unequal numbers of targets, as real batches may."""

# Bounds of bfloat16 against the float32 reference, stated: 8 bits of mantissa in weights and activations.
BFLOAT16_FIRST_LOSS, BFLOAT16_FIRST_NORM, BFLOAT16_LOSSES = 2e-3, 5e-3, 2e-2
BFLOAT16_BETWEEN_STAGES = 5e-4


def make_tokens() -> list:
    draw = random.Random(5)
    batches = [[[draw.randrange(8, 512) for _ in range(LENGTH + 1)] for _ in range(SEQUENCES)] for _ in range(STEPS)]
    for batch in batches:
        for index, row in enumerate(batch):
            for position in range(3 * index):  # row 7 loses 21 of 24 targets, row 0 none
                row[1 + position] = IGNORED
    return batches


SPEC: dict[str, Any] = {"config": LLAMA, "seed": 3, "learning_rate": 1e-2, "ignored": IGNORED, "tokens": make_tokens()}
PARITY = [
    {"check": "parity", "stage": stage, "dtype": dtype, "accumulation": accumulation}
    for dtype in ("float32", "bfloat16")
    for stage in (0, 1, 2, 3)
    for accumulation in (1, 2)
]
EXTRA = [
    {"check": "parity", "stage": 2, "base": "zero2_offload", "accumulation": 2},
    {"check": "parity", "stage": 3, "base": "zero3_offload", "accumulation": 2},
    {"check": "parity", "stage": 1, "activation_checkpointing": "full"},
    {"check": "parity", "stage": 3, "activation_checkpointing": "full", "accumulation": 2},
]
VETO = [
    {"check": "veto", "stage": stage, "dtype": dtype, "kind": kind}
    for stage in (0, 1, 2, 3)
    for dtype in ("float32", "bfloat16")
    for kind in ("nan", "finite")
] + [
    {"check": "veto", "stage": 2, "base": "zero2_offload", "kind": kind, "accumulation": 2}
    for kind in ("nan", "finite")
]
WEIGHTS = [
    {"check": "weights", "stage": stage, "config": config, "dtype": dtype}
    for config in (LLAMA, GPT2, MIXTRAL)
    for dtype in ("float32", "bfloat16")
    for stage in (0, 3)
]
# A coefficient that shows: without the auxiliary loss the gradient norm is another one.
FOUR_EXPERTS = MIXTRAL | {"num_local_experts": 4}
BALANCED = FOUR_EXPERTS | {"output_router_logits": True, "router_aux_loss_coef": 2.0}
AUXILIARY = [{"check": "parity", "layout": "auxiliary", "stage": stage, "config": BALANCED} for stage in (1, 3)]
TWO_STAGES = {"pipeline": 2}
PIPELINE = [
    {
        "check": "parity", "layout": "pipeline", "stage": stage, "dtype": dtype, "accumulation": accumulation,
        "parallel": TWO_STAGES,
    }
    for dtype in ("float32", "bfloat16")
    for stage in (0, 1)
    for accumulation in (1, 4)
] + [
    {
        "check": "veto", "layout": "pipeline", "stage": stage, "dtype": dtype, "kind": kind, "accumulation": 2,
        "parallel": TWO_STAGES,
    }
    for stage in (0, 1)
    for dtype in ("float32", "bfloat16")
    for kind in ("nan", "finite")
]  # fmt: skip
LOADED = [
    {"check": "weights", "stage": stage, "model": {"path": name, "config": None}, "loaded": name}
    for name in ("llama", "gpt2")
    for stage in (0, 3)
]


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="session")
def reference(directory: Path) -> list[list[float]]:
    return run_reference(SPEC, directory)


@pytest.fixture(scope="session")
def results(directory: Path):
    for case in LOADED:
        path = directory / case["loaded"]
        torch.manual_seed(1)
        config = AutoConfig.for_model(**(LLAMA if case["loaded"] == "llama" else GPT2))
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
        case["model"]["path"] = str(path)
    cases = {1: PARITY + AUXILIARY, 2: PARITY + EXTRA + VETO + WEIGHTS + LOADED, "pipeline": PIPELINE}

    @functools.cache
    def of(which: int | str) -> list[dict[str, Any]]:
        world_size = which if isinstance(which, int) else 2  # pipelines apart: DeepSpeed keeps their groups globally
        return run_workers(WORKER, SPEC | {"cases": cases[which]}, world_size, directory / str(which))

    return of


def chosen(results: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    found = [case for case in results if all(case.get(key) == value for key, value in wanted.items())]
    assert found
    return found


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_float32_equals_the_reference(results, reference, world_size: int, stage: int) -> None:
    for case in chosen(results(world_size), check="parity", stage=stage, dtype="float32"):
        steps = case["result"]["steps"]
        assert abs(steps[0][0] - reference[0][0]) < 1e-5, case
        assert math.isclose(steps[0][1], reference[0][1], rel_tol=1e-4), case
        assert max(abs(ours[0] - plain[0]) for ours, plain in zip(steps, reference, strict=True)) < 1e-4, case


@pytest.mark.parametrize("world_size", [1, 2])
def test_bfloat16_is_near_and_all_stages_alike(results, reference, world_size: int) -> None:
    cases = chosen(results(world_size), check="parity", dtype="bfloat16")
    assert len(cases) == 8
    for case in cases:
        steps = case["result"]["steps"]
        assert abs(steps[0][0] - reference[0][0]) < BFLOAT16_FIRST_LOSS, case
        assert math.isclose(steps[0][1], reference[0][1], rel_tol=BFLOAT16_FIRST_NORM), case
        assert max(abs(ours[0] - plain[0]) for ours, plain in zip(steps, reference, strict=True)) < BFLOAT16_LOSSES
    for accumulation in (1, 2):  # another split of the batch rounds elsewhere; stages must not
        alike = [case["result"]["steps"] for case in cases if case["accumulation"] == accumulation]
        for step in range(STEPS):
            losses = [steps[step][0] for steps in alike]
            assert max(losses) - min(losses) < BFLOAT16_BETWEEN_STAGES, (accumulation, step, losses)


@pytest.mark.parametrize("case", range(len(EXTRA)))
def test_offload_and_recomputation_equal_the_reference(results, reference, case: int) -> None:
    [found] = chosen(results(2), **EXTRA[case])
    steps = found["result"]["steps"]
    assert abs(steps[0][0] - reference[0][0]) < 1e-5
    assert math.isclose(steps[0][1], reference[0][1], rel_tol=1e-4)
    assert max(abs(ours[0] - plain[0]) for ours, plain in zip(steps, reference, strict=True)) < 1e-4


def test_target_tokens_are_counted_over_all_ranks(results) -> None:
    expected = [sum(token != IGNORED for row in batch for token in row[1:]) for batch in SPEC["tokens"]]
    for world_size in (1, 2):
        for case in chosen(results(world_size), check="parity"):
            assert case["result"]["target_tokens"] == expected


def test_a_broken_model_would_be_noticed(reference, directory: Path) -> None:
    broken = run_reference(SPEC | {"broken": True}, directory / "broken")
    assert abs(broken[0][0] - reference[0][0]) > 1e-5 or abs(broken[0][1] / reference[0][1] - 1) > 1e-4


@pytest.mark.parametrize("case", range(len(VETO)))
def test_a_vetoed_step_changes_nothing(results, case: int) -> None:
    [found] = chosen(results(2), **VETO[case])
    check_veto(found)


def check_veto(found: dict[str, Any]) -> None:
    result = found["result"]
    assert result["first"][0] == result["first"][1]
    assert result["asked"] == 1
    assert not result["applied"]
    assert result["unchanged"]
    assert result["finite"] == (found["kind"] == "finite")
    assert result["after"] == result["expected"]


def test_experts_balance_their_load_where_the_config_says_so(results, directory: Path) -> None:
    reference = run_reference(SPEC | {"config": BALANCED}, directory / "balanced")
    unbalanced = run_reference(SPEC | {"config": FOUR_EXPERTS}, directory / "unbalanced")
    assert not math.isclose(reference[0][1], unbalanced[0][1], rel_tol=1e-2)
    for case in chosen(results(1), layout="auxiliary"):
        for ours, plain in zip(case["result"]["steps"], reference, strict=True):
            assert abs(ours[0] - plain[0]) < 1e-4, case
            assert math.isclose(ours[1], plain[1], rel_tol=1e-3), case
        assert math.isclose(case["result"]["steps"][0][1], reference[0][1], rel_tol=1e-4)


@pytest.mark.parametrize("stage", [0, 1])
def test_pipeline_stages_clip_and_step_as_the_reference(results, reference, stage: int) -> None:
    for case in chosen(results("pipeline"), check="parity", stage=stage, dtype="float32"):
        steps = case["result"]["steps"]
        for ours, plain in zip(steps, reference, strict=True):
            assert abs(ours[0] - plain[0]) < 1e-5, case
            assert math.isclose(ours[1], plain[1], rel_tol=1e-4), case
    for case in chosen(results("pipeline"), check="parity", stage=stage, dtype="bfloat16"):
        steps = case["result"]["steps"]
        assert abs(steps[0][0] - reference[0][0]) < BFLOAT16_FIRST_LOSS, case
        assert math.isclose(steps[0][1], reference[0][1], rel_tol=BFLOAT16_FIRST_NORM), case
        assert max(abs(ours[0] - plain[0]) for ours, plain in zip(steps, reference, strict=True)) < BFLOAT16_LOSSES


@pytest.mark.parametrize("case", range(len([case for case in PIPELINE if case["check"] == "veto"])))
def test_a_vetoed_step_changes_no_stage(results, case: int) -> None:
    check_veto(chosen(results("pipeline"), check="veto")[case])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_zero3_starts_from_the_weights_of_stage_0(results, family: str, dtype: str) -> None:
    stages = {
        case["stage"]: case["result"]
        for case in chosen(results(2), check="weights", dtype=dtype)
        if case["config"]["model_type"] == family
    }
    assert all(math.isfinite(value) for sums in stages[0].values() for value in sums)  # every element was there
    assert stages[0] == stages[3]
    assert any(total > 0 for _, total in stages[0].values())


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pretrained_weights_arrive_whole(results, directory: Path, name: str, stage: int) -> None:
    [found] = chosen(results(2), loaded=name, stage=stage)
    stored = load_file(directory / name / "model.safetensors")
    assert found["result"].keys() == stored.keys()
    for key, tensor in stored.items():
        assert found["result"][key] == [tensor.double().sum().item(), tensor.double().abs().sum().item()]
