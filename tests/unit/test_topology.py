"""Ranks and their places; where rows of blocks are cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.parallel import ParallelConfig
from trainer.models.balance import Costs, balance
from trainer.parallel.topology import MOST_HOSTS, Place, Topology, mesh_of, mesh_table

pytestmark = pytest.mark.fast

DEGREE = st.integers(1, 4)


@given(DEGREE, DEGREE, DEGREE, DEGREE)
def test_every_rank_has_its_own_place(pipeline: int, data: int, sequence: int, tensor: int) -> None:
    mesh = Topology(pipeline, data, sequence, tensor)
    places = [mesh.place(rank) for rank in range(mesh.world_size)]
    assert len(set(places)) == pipeline * data * sequence * tensor
    assert [mesh.rank(place) for place in places] == list(range(mesh.world_size))
    # the innermost axis is the one that changes fastest
    assert places == sorted(places, key=lambda p: (p.stage, p.data, p.sequence, p.tensor))


def test_the_order_is_deepspeeds() -> None:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    theirs = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=3)
    mesh = Topology(pipeline=2, data=3, tensor=2)
    for rank in range(12):
        place, coordinates = mesh.place(rank), theirs.get_coord(rank)
        assert (place.stage, place.data, place.tensor) == (coordinates.pipe, coordinates.data, coordinates.model)


def test_outside_of_the_mesh() -> None:
    with pytest.raises(ValueError, match="rank 4"):
        Topology(2, 2).place(4)
    with pytest.raises(ValueError, match="multiple"):
        mesh_of(ParallelConfig(pipeline=2, tensor=2), 6)
    assert mesh_of(ParallelConfig(pipeline=2, tensor=2), 8) == Topology(2, 2, 1, 2)


def test_table_of_ranks() -> None:
    hosts = ["node1"] * 4 + ["node2"] * 4
    assert mesh_table(Topology(pipeline=2, data=2, tensor=2), hosts) == [
        "host   ranks  stage  replica  tensor",
        "node1  0-3    0      0-1      0-1",
        "node2  4-7    1      0-1      0-1",
    ]
    assert mesh_table(Topology(data=4), ["a", "b", "a", "b"], expert=2) == [
        "host  ranks  replica  expert",
        "a     0,2    0,2      0",
        "b     1,3    1,3      1",
    ]
    assert mesh_table(Topology(sequence=2), ["a", "a"]) == ["host  ranks  sequence", "a     0-1    0-1"]
    many = mesh_table(Topology(pipeline=2, data=50), [f"n{rank}" for rank in range(100)])
    assert len(many) == MOST_HOSTS + 2
    assert many[-1] == f"and {100 - MOST_HOSTS} more hosts"


def test_groups_inside_a_node() -> None:
    mesh = Topology(data=2, sequence=2, tensor=2)
    assert not mesh.crosses_nodes("tensor", 2)
    assert mesh.crosses_nodes("sequence", 2)
    assert not mesh.crosses_nodes("sequence", 8)
    assert mesh.place(5) == Place(data=1, tensor=1)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(0, 30), st.integers(0, 30), st.integers(1, 4))
def test_no_split_is_better(blocks: list[int], front: int, back: int, stages: int) -> None:
    costs = Costs(tuple(map(float, blocks)), float(front), float(back))
    if stages > len(blocks):
        with pytest.raises(ValueError, match="blocks"):
            balance(costs, stages)
        return
    bounds = balance(costs, stages)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, len(blocks), stages + 1)
    assert all(first < last for first, last in itertools.pairwise(bounds))

    def dearest(cuts: tuple[int, ...]) -> float:
        return max(costs.of(first, last) for first, last in itertools.pairwise(cuts))

    every = itertools.combinations(range(1, len(blocks)), stages - 1)
    assert dearest(bounds) == min(dearest((0, *cuts, len(blocks))) for cuts in every)


def test_the_others_are_even_too() -> None:
    # The head is as dear as four blocks. (0, 6, 10, 12) would be no slower, but less even.
    assert balance(Costs((1.0,) * 12, 0.0, 4.0), 3) == (0, 5, 10, 12)
