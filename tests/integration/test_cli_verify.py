"""``trainer verify``: recipes pass, a broken one fails, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from trainer.verification.compare import Deviations
from trainer.verification.verify import BOUNDS, Verification


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_world(tmp_path_factory.mktemp("verify"))
    tiny.write_recipe(folder)
    return folder


@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.pipeline=2", "data.mask_documents=true", "model.freeze=['norm']"),
        pytest.param(
            ("model.dtype=float32", "deepspeed.base=zero2", "optimizer.name=muon", "schedule.warmup_steps=3"),
            marks=pytest.mark.sweep,
        ),
        pytest.param(
            ("model.dtype=float32", "deepspeed.base=zero1", "optimizer.name=adagrad", "schedule.warmup_steps=3"),
            marks=pytest.mark.sweep,
        ),
        (
            "model.dtype=bfloat16",
            "deepspeed.base=zero3",
            "optimizer.name=lion",
            "schedule.warmup_steps=2",
            "batch.warmup={start_size: 4, increment: 4, steps: 3}",
        ),
    ],
)
def test_a_recipe_computes_what_plain_transformers_does(world: Path, overrides: tuple[str, ...]) -> None:
    before = tiny.tree(world)
    done = tiny.run(tiny.command("verify", "tiny.yaml", *overrides, "--steps", 2), world, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("step  loss")
    assert [line.split()[0] for line in lines[1:3]] == ["1", "2"]
    assert "gradients of" in lines[3]
    assert lines[4].startswith("passed: ")
    assert not done.stderr.strip(), done.stderr
    assert tiny.tree(world) == before


def test_a_recipe_that_check_refuses_is_refused(world: Path) -> None:
    done = tiny.run(tiny.command("verify", "tiny.yaml", "parallel.pipeline=2", "deepspeed.base=zero2"), world)
    assert done.returncode == 2
    assert "set deepspeed.base: zero1" in done.stderr


def test_what_counts_as_failed() -> None:
    good = Deviations(((1.0, 1.0),), ((2.0, 2.0),), {"a": 1e-6}, 0.0, ())
    bounds = BOUNDS["float32"]
    assert Verification(good, good, bounds).passed
    for broken in (
        Deviations(((1.0, 1.001),), ((2.0, 2.0),), {"a": 1e-6}, 0.0, ()),
        Deviations(((1.0, 1.0),), ((2.0, 2.1),), {"a": 1e-6}, 0.0, ()),
        Deviations(((float("nan"), 1.0),), ((2.0, 2.0),), {"a": 1e-6}, 0.0, ()),
        Deviations(((1.0, 1.0),), ((2.0, 2.0),), {"a": 1e-6}, 0.0, ("b",)),
    ):
        assert not Verification(good, broken, bounds).passed
    for first in (
        Deviations(((1.0, 1.0),), ((2.0, 2.0),), {"a": 1e-6, "b": 1e-3}, 0.0, ()),
        Deviations(((1.0, 1.0),), ((2.0, 2.0),), None, 0.0, ()),
    ):
        assert not Verification(first, good, bounds).passed
