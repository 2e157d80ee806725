"""The global batch of every step: known values, an independent count, and what must hold for all warm-ups."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.batch_schedule import batch_size, samples_through, steps_for, warmup_text
from trainer.config.derive import derive, derive_problems
from trainer.config.parallel import BatchConfig
from trainer.config.run import Recipe
from trainer.config.schema import recipe_problems

pytestmark = pytest.mark.fast


def batch(global_size: int, start: int, increment: int, steps: int) -> BatchConfig:
    warmup = {"start_size": start, "increment": increment, "steps": steps}
    return BatchConfig.model_validate({"global_size": global_size, "warmup": warmup})


def mapping(**sections: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "run": {"directory": "runs/a", "steps": 1000},
        "model": {"path": "gpt2"},
        "data": {"train": [{"path": "a"}], "sequence_length": 8},
    }
    return base | sections


@st.composite
def warm_ups(draw: st.DrawFn) -> BatchConfig:
    start, increment, count = draw(st.integers(1, 30)), draw(st.integers(1, 30)), draw(st.integers(1, 20))
    return batch(start + count * increment, start, increment, draw(st.integers(count, 150)))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (BatchConfig(global_size=8), [8, 8, 8]),
        (batch(8, 2, 2, 3), [2, 4, 6, 8, 8]),
        (batch(8, 2, 2, 6), [2, 2, 4, 4, 6, 6, 8]),
        (batch(8, 4, 4, 3), [4, 4, 4, 8]),
        (batch(8, 2, 3, 5), [2, 2, 2, 5, 5, 8]),  # not divisible: the smaller size is kept a step longer
    ],
)
def test_known_sizes(config: BatchConfig, expected: list[int]) -> None:
    assert [batch_size(config, step) for step in range(1, len(expected) + 1)] == expected


@given(warm_ups())
def test_it_grows_in_whole_increments_and_shares_the_steps_equally(config: BatchConfig) -> None:
    warmup = config.warmup
    assert warmup is not None
    sizes = [batch_size(config, step) for step in range(1, warmup.steps + 3)]
    assert sizes[0] == warmup.start_size
    assert sizes[warmup.steps :] == [config.global_size] * 2
    assert {after - before for before, after in pairwise(sizes)} <= {0, warmup.increment}
    counts = [sizes.count(size) for size in range(warmup.start_size, config.global_size, warmup.increment)]
    assert sum(counts) == warmup.steps
    assert max(counts) - min(counts) <= 1


@given(warm_ups())
def test_positions_are_the_sums_of_the_sizes(config: BatchConfig) -> None:
    sizes = [batch_size(config, step) for step in range(1, 160)]
    sums = list(accumulate(sizes, initial=0))
    assert [samples_through(config, step) for step in range(160)] == sums
    for samples in {0, 1, *sums, *(total + 1 for total in sums[:-1]), *(total - 1 for total in sums[1:])}:
        assert steps_for(config, samples) == next(step for step, total in enumerate(sums) if total >= samples)


def test_a_step_below_1_is_refused() -> None:
    with pytest.raises(ValueError, match="count from 1"):
        batch_size(batch(8, 2, 2, 3), 0)


@given(warm_ups(), st.floats(1, 1e6))
def test_tokens_are_reached_by_the_smallest_number_of_steps(config: BatchConfig, tokens: float) -> None:
    run = {"directory": "a", "tokens": tokens}
    recipe = Recipe.model_validate(mapping(run=run, batch=config.model_dump()))
    derived = derive(recipe, 1)
    read = [8 * samples_through(config, derived.total_steps - back) for back in (0, 1)]
    assert read[0] >= tokens > read[1]
    assert derived.total_tokens == read[0]
    assert derived.tokens_per_step == 8 * config.global_size


@pytest.mark.parametrize(
    ("warmup", "key", "fix"),
    [
        ({"start_size": 64, "increment": 1, "steps": 9}, "start_size", "use less than 64"),
        ({"start_size": 16, "increment": 20, "steps": 9}, "increment", "use 16, or any divisor of 48"),
        ({"start_size": 16, "increment": 16, "steps": 2}, "steps", "use at least 3"),
    ],
)
def test_a_warm_up_that_can_not_be_is_refused(warmup: dict[str, int], key: str, fix: str) -> None:
    (problem,) = recipe_problems(mapping(batch={"global_size": 64, "warmup": warmup}))
    assert problem.key == f"batch.warmup.{key}"
    assert fix in problem.fix


@given(warm_ups(), st.integers(1, 4), st.integers(1, 4))
def test_every_size_divides_or_the_fix_names_sizes_that_do(config: BatchConfig, micro: int, ranks: int) -> None:
    recipe = Recipe.model_validate(mapping(batch=config.model_dump() | {"micro_size": micro}))
    assert config.warmup is not None
    sizes = {batch_size(config, step) for step in range(1, config.warmup.steps + 2)}
    problems = derive_problems(recipe, ranks)
    assert (not problems) == all(size % (micro * ranks) == 0 for size in sizes)
    keys = [problem.key for problem in problems]
    assert ("batch.global_size" in keys) == (config.global_size % (micro * ranks) != 0)
    if problems and "set batch.warmup" in problems[-1].fix:
        words = problems[-1].fix.split()
        changed = {"start_size": int(words[3]), "increment": int(words[-1]), "steps": config.warmup.steps}
        fixed = config.model_dump() | {"micro_size": micro, "warmup": changed}
        assert not derive_problems(Recipe.model_validate(mapping(batch=fixed)), ranks)


def test_the_fix_is_near_what_was_asked_for() -> None:
    warmup = {"start_size": 18, "increment": 23, "steps": 100}
    recipe = Recipe.model_validate(mapping(batch={"global_size": 64, "micro_size": 4, "warmup": warmup}))
    first, second = derive_problems(recipe, 2)
    assert [first.key, second.key] == ["batch.warmup.start_size", "batch.warmup.increment"]
    assert "4 x 2 = 8" in first.rule
    assert first.fix == "set batch.warmup.start_size to 16 and batch.warmup.increment to 24"


def test_a_size_that_leaves_no_room_says_so() -> None:
    warmup = {"start_size": 2, "increment": 2, "steps": 10}
    recipe = Recipe.model_validate(mapping(batch={"global_size": 8, "micro_size": 8, "warmup": warmup}))
    assert derive_problems(recipe, 1)[0].fix == "remove batch.warmup, or raise batch.global_size"


def test_words() -> None:
    assert warmup_text(BatchConfig(global_size=8)) == ""
    assert warmup_text(batch(64, 16, 16, 99)) == " after a warm-up from 16 by 16 over 99 steps"
    assert math.isclose(samples_through(batch(10**6, 10**5, 10**3, 10**6), 10**6), 5.5e11, rel_tol=1e-2)
