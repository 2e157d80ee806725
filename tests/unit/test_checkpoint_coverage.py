"""Manifests that leave out or repeat elements are told from whole ones, whatever the layout."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.checkpoint.coverage import coverage_problems

pytestmark = pytest.mark.fast


def manifest(slices: list[list[Any]], shape: list[int], num_shards: int = 64) -> dict[str, Any]:
    tensors = {"t": {"shape": shape, "states": {"weight": {"dtype": "float32", "slices": slices}}}}
    return {"shards": [str(number) for number in range(num_shards)], "tensors": tensors}


def divided(size: int, ends: set[int]) -> list[list[Any]]:
    """Return slices of 0 .. size, a shard each."""
    edges = [0, *sorted(end for end in ends if 0 < end < size), size]
    return [[shard, low, high - low] for shard, (low, high) in enumerate(pairwise(edges))]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], list[list[Any]]]:
    """Return a shape and slices that hold it once: whole, or cut along a dim, each part divided further."""
    parts, chunks = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    if parts == 1:
        return shape, divided(math.prod(shape), draw(st.sets(st.integers(1, 64), max_size=4)))
    dim = draw(st.integers(0, len(shape) - 1))
    shape[dim] *= parts * chunks
    slices: list[list[Any]] = []
    for part in range(parts):
        pieces = divided(math.prod(shape) // parts, draw(st.sets(st.integers(1, 64), max_size=4)))
        slices += [[len(slices) + n, start, count, [dim, part, parts, chunks]] for n, (_, start, count) in
                   enumerate(pieces)]  # fmt: skip
    return shape, draw(st.permutations(slices))


@given(layouts())
def test_whole_layouts_have_no_problems(layout: tuple[list[int], list[list[Any]]]) -> None:
    shape, slices = layout
    assert coverage_problems(manifest(slices, shape)) == []
    assert coverage_problems(manifest([*slices, [63, 0, 0]], shape)) == []


@given(layouts(), st.data())
def test_what_is_left_out_repeated_or_too_long_is_found(
    layout: tuple[list[int], list[list[Any]]], data: st.DataObject
) -> None:
    shape, slices = layout
    number = data.draw(st.integers(0, len(slices) - 1))
    chosen = slices[number]
    others = slices[:number] + slices[number + 1 :]
    assert coverage_problems(manifest(others, shape))
    assert coverage_problems(manifest([*slices, [63, *chosen[1:]]], shape))
    assert coverage_problems(manifest([*others, [chosen[0], chosen[1], chosen[2] + 1, *chosen[3:]]], shape))
    assert coverage_problems(manifest([*others, [chosen[0], chosen[1], chosen[2] - 1, *chosen[3:]]], shape))
    assert coverage_problems(manifest([*others, [64, *chosen[1:]]], shape))


@pytest.mark.parametrize(
    ("slices", "expected"),
    [
        ([[0, 0, 10], [1, 12, 12]], ["t weight: elements 10..11 are in no shard"]),
        ([[0, 0, 12], [1, 10, 14]], ["t weight: elements 10..11 are in two shards"]),
        ([[0, 0, 20]], ["t weight: elements 20..23 are in no shard"]),
        ([[0, 0, 30]], ["t weight: elements 24..29 are beyond its end"]),
        ([], ["t weight: no shard holds any of its 24 elements"]),
        ([[0, 0, 12], [0, 12, 12]], ["t weight: shard 0 is named twice"]),
        ([[0, 0, 12, [0, 0, 2, 1]]], ["t weight: no shard holds part 1 of 2"]),
        (
            [[0, 0, 12, [0, 0, 2, 1]], [1, 0, 8, [0, 1, 2, 1]]],
            ["t weight: elements 8..11 are in no shard of part 1 of 2"],
        ),
        ([[0, 0, 12, [0, 0, 2, 1]], [1, 0, 12, [1, 1, 2, 1]]], ["t weight: its parts are of different cuts"]),
        (
            [[0, 0, 24], [1, 0, 12, [0, 0, 2, 1]], [2, 0, 12, [0, 1, 2, 1]]],
            ["t weight: is held whole and in parts too"],
        ),
        ([["x", 0, 24]], ["t weight: what the manifest says of it can't be read"]),
        ([[0, 0]], ["t weight: what the manifest says of it can't be read"]),
    ],
)
def test_sentences(slices: list[list[Any]], expected: list[str]) -> None:
    assert coverage_problems(manifest(slices, [4, 6])) == expected


@pytest.mark.parametrize("fields", [{}, {"tensors": [], "shards": []}, {"tensors": {}, "shards": {}}])
def test_manifests_without_tensors(fields: dict[str, Any]) -> None:
    assert coverage_problems(fields) == ["the manifest lists no tensors or no shards"]


def test_entries_that_are_none() -> None:
    assert coverage_problems({"shards": [], "tensors": {"t": None}}) == ["t: no shape and states in the manifest"]
    assert coverage_problems({"shards": [], "tensors": {"t": {"shape": [1], "states": {}}}}) == ["t: has no state"]
