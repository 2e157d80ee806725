"""A diagonal of tests/distributed/resume_matrix.py, for the sweep.

Every layout, with both dtypes and both ways to save among them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from forked_runs import Trainer
from resume_matrix import CELLS, DIAGONAL, DTYPES, LAYOUTS, Cell, Matrix


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    with Trainer(tmp_path_factory.mktemp("matrix")) as trainer:
        yield Matrix(trainer)


@pytest.mark.sweep
@pytest.mark.parametrize("cell", DIAGONAL, ids=lambda cell: cell.name)
def test_resumed_equals_undisturbed(matrix: Matrix, cell: Cell) -> None:
    matrix.prove(cell)


def test_the_diagonal_meets_every_value() -> None:
    assert len(CELLS) == 28
    assert [cell.layout for cell in DIAGONAL] == list(LAYOUTS)
    for field, values in (("dtype", set(DTYPES)), ("asynchronous", {True, False}), ("killed", {True, False})):
        assert {getattr(cell, field) for cell in DIAGONAL} == values
