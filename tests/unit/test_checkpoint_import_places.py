"""Which entry of an optimizer is which parameter, told by shapes alone; and where ZeRO keeps a parameter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.checkpoint.import_pickle import Node
from trainer.checkpoint.import_plain import _only_assignment
from trainer.checkpoint.import_zero import partitioned, piece_length, places_of, sharded
from trainer.core.errors import RefusedError

pytestmark = pytest.mark.fast
MATRIX, OTHER, VECTOR = (2, 2), (3, 2), (2,)


@pytest.mark.parametrize(
    ("groups", "parameters", "expected"),
    [
        ([(MATRIX, OTHER), (VECTOR,)], [MATRIX, VECTOR, OTHER], [0, 1, 0]),
        ([(MATRIX, MATRIX)], [MATRIX, VECTOR, MATRIX], [0, None, 0]),  # the vector is frozen
        ([(MATRIX, None)], [MATRIX, OTHER], [0, 0]),  # an entry without state fits any
        ([(MATRIX,)], [MATRIX, MATRIX], None),  # which of the two is frozen?
        ([(MATRIX,), (MATRIX,)], [MATRIX, MATRIX], None),  # which is of which group?
        ([(OTHER, MATRIX)], [MATRIX, OTHER], None),  # not in the model's order
        ([(MATRIX, MATRIX)], [MATRIX], None),
        ([(MATRIX,) * 300, (VECTOR,) * 600], [MATRIX, VECTOR, VECTOR] * 300, [0, 1, 1] * 300),
    ],
)
def test_shapes_tell_parameters_apart_or_none_is_chosen(
    groups: list[tuple[tuple[int, ...] | None, ...]], parameters: list[tuple[int, ...]], expected: list[int] | None
) -> None:
    assert _only_assignment(groups, parameters) == expected


def node(value: object) -> Node:
    return Node(value, Path("file.pt"), "")


sizes = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@settings(deadline=None)
@given(sizes, st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_flat_partitions_are_put_together(counts: list[int], ranks: int, alignment: int, lean: bool) -> None:
    """Parameters end to end, each padded, cut into equal partitions; saved with the padding at the end or without."""
    shapes = {f"p{number}": [count] for number, count in enumerate(counts)}
    values = [torch.arange(count) + 100.0 * number for number, count in enumerate(counts)]
    paddings = [0 if number == len(counts) - 1 else -count % alignment for number, count in enumerate(counts)]
    flat = torch.cat([torch.nn.functional.pad(v, (0, p), value=-1) for v, p in zip(values, paddings, strict=True)])
    length = -(-len(flat) // (2 * ranks)) * 2
    whole = torch.nn.functional.pad(flat, (0, length * ranks - len(flat)), value=-1)
    parts = [whole[rank * length : (rank + 1) * length] for rank in range(ranks)]
    if lean:
        parts = [part[: max(0, len(flat) - rank * length)] for rank, part in enumerate(parts)]
    found = dict(partitioned(places_of(node(shapes), lambda count: count, paddings), [node(part) for part in parts]))
    assert all(torch.equal(found[f"p{number}"].read(), value) for number, value in enumerate(values))


@settings(deadline=None)
@given(sizes, st.integers(1, 5))
def test_pieces_of_zero3_are_put_together(counts: list[int], ranks: int) -> None:
    shapes = {f"p{number}": [count] for number, count in enumerate(counts)}
    values = [torch.arange(count) + 100.0 * number for number, count in enumerate(counts)]
    flats: list[torch.Tensor] = []
    for rank in range(ranks):
        pieces: list[torch.Tensor] = []
        for value in values:
            length = piece_length(len(value), ranks)
            piece = value[rank * length : (rank + 1) * length]
            pieces.append(torch.nn.functional.pad(piece, (0, length - len(piece)), value=-1))
        flats.append(torch.cat(pieces))
    places = places_of(node(shapes), lambda count: piece_length(count, ranks))
    found = dict(sharded(places, [node(flat) for flat in flats]))
    assert all(torch.equal(found[f"p{number}"].read(), value) for number, value in enumerate(values))


@pytest.mark.parametrize("length", [9, 40])
def test_too_few_or_too_many_elements_are_refused(length: int) -> None:
    places = places_of(node({"p": [20]}), lambda count: count)
    with pytest.raises(RefusedError, match="parameters have 20"):
        list(partitioned(places, [node(torch.zeros(length)), node(torch.zeros(length))]))
