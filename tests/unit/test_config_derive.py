"""The batch triangle, the mesh and the length of a run."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.derive import derive, derive_problems, world_size_of
from trainer.config.run import Recipe
from trainer.core.errors import RecipeError

pytestmark = pytest.mark.fast


def recipe(**sections: Any) -> Recipe:
    base: dict[str, Any] = {
        "run": {"directory": "runs/a", "steps": 10},
        "model": {"path": "gpt2"},
        "data": {"train": [{"path": "a"}], "sequence_length": 8},
        "batch": {"global_size": 8},
    }
    return Recipe.model_validate({**base, **sections})


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 16), st.integers(1, 4))
def test_triangle(global_size: int, micro: int, world_size: int, pipeline: int) -> None:
    candidate = recipe(batch={"global_size": global_size, "micro_size": micro}, parallel={"pipeline": pipeline})
    fits = world_size % pipeline == 0 and global_size % (micro * (world_size // pipeline)) == 0
    problems = derive_problems(candidate, world_size)
    assert fits == (not problems)
    if fits:
        derived = derive(candidate, world_size)
        assert derived.data_parallel * pipeline == world_size
        assert micro * derived.accumulation * derived.data_parallel == global_size
    else:
        with pytest.raises(RecipeError):
            derive(candidate, world_size)


def test_the_fix_names_sizes_that_work() -> None:
    (problem,) = derive_problems(recipe(batch={"global_size": 15, "micro_size": 4}), 3)
    assert "12 or 24" in problem.fix
    assert "batch.micro_size to one of 1, 5" in problem.fix
    for global_size, micro in ((12, 4), (24, 4), (15, 1), (15, 5)):
        assert not derive_problems(recipe(batch={"global_size": global_size, "micro_size": micro}), 3)


@given(st.floats(1, 1e12))
def test_tokens_round_up_to_whole_steps(tokens: float) -> None:
    derived = derive(recipe(run={"directory": "a", "tokens": tokens}), 2)
    assert derived.tokens_per_step == 64
    assert derived.total_steps == math.ceil(tokens / 64)
    assert derived.total_steps * 64 >= tokens


@pytest.mark.parametrize(
    ("launch", "ranks"),
    [
        ({}, 1),
        ({"processes": 3}, 3),
        ({"processes": 3, "launcher": "local", "slurm": {"nodes": 4}}, 3),
        ({"launcher": "slurm", "slurm": {"nodes": 2}}, 16),
        ({"launcher": "slurm", "processes": 2, "slurm": {"nodes": 3, "gpus_per_node": 0}}, 6),
    ],
)
def test_world_size(launch: dict[str, Any], ranks: int) -> None:
    assert world_size_of(recipe(launch=launch)) == ranks


def test_expert_ranks_are_data_parallel_ones() -> None:
    assert derive(recipe(parallel={"expert": 2}), 4).data_parallel == 4
    assert derive_problems(recipe(parallel={"expert": 3}), 4)[0].key == "parallel"
