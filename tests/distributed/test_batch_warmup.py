"""Steps of growing size: each has the loss and every gradient of a plain loop over the same sequences.

One process group takes all ZeRO stages, another the pipeline stages (DeepSpeed keeps their groups in globals).
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import TESTS, run_reference, run_workers
from safetensors.torch import load_file
from test_engine import LLAMA, SPEC

WORKER = TESTS / "distributed" / "engine_worker.py"
SIZES = [2, 4, 4, 6, 8]
"""On two ranks of one sequence at a time: 1, 2, 2, 3 and 4 micro-batches; on two pipeline stages twice as many."""
MOMENTUM = 1e-3
"""So small that the momentum after a step is all but that step's gradient."""
SGD = {"name": "sgd", "momentum": MOMENTUM, "weight_decay": 0.0, "clip_norm": 0.0}
STAGED = {"parallel": {"pipeline": 2}}


def cases(stages: tuple[int, ...], **layout: Any) -> list[dict[str, Any]]:
    made = [{"name": f"zero{stage}", "stage": stage, "optimizer": SGD} for stage in stages]
    made += [{"name": f"adamw{stage}", "stage": stage} for stage in stages]
    made += [{"name": f"veto{stage}", "stage": stage, "veto": 0} for stage in stages]
    return [{"check": "growing", "sizes": SIZES, "micro": 1} | case | layout for case in made]


ZERO = [
    *cases((0, 1, 2, 3)),
    {"check": "growing", "sizes": SIZES, "micro": 1, "name": "offload2", "stage": 2, "base": "zero2_offload"},
    {"check": "growing", "sizes": SIZES, "micro": 1, "name": "offload3", "stage": 3, "base": "zero3_offload"},
    {"check": "growing", "sizes": [*SIZES[::-1]], "micro": 1, "name": "shrinking", "stage": 2},
]
PIPELINE = cases((0, 1), **STAGED)
ALL = [(layout, case["name"]) for layout, made in (("zero", ZERO), ("pipeline", PIPELINE)) for case in made]
CLIPPED = [(layout, name) for layout, name in ALL if name.startswith(("adamw", "offload"))]
PLAIN = [(layout, name) for layout, name in ALL if name.startswith("zero")]
VETOED = [
    pytest.param(layout, name, marks=[pytest.mark.sweep] if number % 2 else [])
    for number, (layout, name) in enumerate(case for case in ALL if case[1].startswith("veto"))
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("warmup")


@pytest.fixture(scope="module")
def results(directory: Path):
    @functools.cache
    def of(layout: str) -> dict[str, dict[str, Any]]:
        output = directory / layout
        output.mkdir()
        made = [
            case | ({"output": str(output)} if "optimizer" in case else {})
            for case in (ZERO if layout == "zero" else PIPELINE)
        ]
        return {case["name"]: case["result"] for case in run_workers(WORKER, SPEC | {"cases": made}, 2, output)}

    return of


def reference(directory: Path, name: str, sizes: list[int], **more: Any) -> list[list[float]]:
    tokens = [batch[:size] for batch, size in zip(SPEC["tokens"], sizes, strict=True)]
    return run_reference(SPEC | {"config": LLAMA, "tokens": tokens} | more, directory / name)


@pytest.fixture(scope="module")
def clipped(directory: Path) -> list[list[float]]:
    return reference(directory, "clipped", SIZES)


@pytest.fixture(scope="module")
def plain(directory: Path) -> list[list[float]]:
    (directory / "plain").mkdir()
    return reference(directory, "plain", SIZES, gradients=str(directory / "plain" / "step"), momentum=MOMENTUM)


def assert_equal(found: list[list[float]], expected: list[list[float]]) -> None:
    assert abs(found[0][0] - expected[0][0]) < 1e-5
    for ours, theirs in zip(found, expected, strict=True):
        assert abs(ours[0] - theirs[0]) < 1e-4
        assert math.isclose(ours[1], theirs[1], rel_tol=1e-4)


@pytest.mark.parametrize(("layout", "name"), CLIPPED)
def test_losses_and_norms_equal_the_reference(results, clipped, layout: str, name: str) -> None:
    assert_equal(results(layout)[name]["steps"], clipped)


def test_the_size_may_fall_too(results, directory: Path) -> None:
    assert_equal(results("zero")["shrinking"]["steps"], reference(directory, "shrinking", SIZES[::-1]))


@pytest.mark.parametrize(("layout", "name"), PLAIN)
def test_every_gradient_of_every_step_equals_the_reference(
    results, plain, directory: Path, layout: str, name: str
) -> None:
    assert_equal(results(layout)[name]["steps"], plain)
    for step in range(len(SIZES)):
        expected = load_file(directory / "plain" / f"step-{step}.safetensors")
        found = load_file(directory / layout / f"{name}-{step}.safetensors")
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            difference = torch.linalg.vector_norm(found[key] - tensor) / torch.linalg.vector_norm(tensor)
            assert difference < 1e-4, (step, key, difference)


@pytest.mark.parametrize(("layout", "name"), VETOED)
def test_a_refused_step_disturbs_no_later_size(results, directory: Path, layout: str, name: str) -> None:
    """The first step is refused: the second, of another size, is what the first step of a fresh run would be."""
    fresh = directory / f"fresh-{layout}-{name}"
    tokens = [batch[:size] for batch, size in zip(SPEC["tokens"], SIZES, strict=True)][1:]
    assert_equal(results(layout)[name]["steps"][1:], run_reference(SPEC | {"tokens": tokens}, fresh))


@pytest.mark.parametrize("layout", ["zero", "pipeline"])
def test_target_tokens_are_those_of_the_step(results, layout: str) -> None:
    expected = [
        sum(token != SPEC["ignored"] for row in batch[:size] for token in row[1:])
        for batch, size in zip(SPEC["tokens"], SIZES, strict=True)
    ]
    for name, result in results(layout).items():
        assert name == "shrinking" or result["target_tokens"] == expected
