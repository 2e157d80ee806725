"""A checkpoint of one layout is another's: the short version of tests/distributed/reshape_sweep.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import reshape
from forked_runs import Trainer
from reshape import TOLERANCE, Layout, Source


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    with Trainer(tmp_path_factory.mktemp("reshape")) as made:
        yield made


@pytest.fixture(scope="module")
def source(trainer: Trainer) -> Source:
    return reshape.undisturbed(trainer)


LAYOUTS = (
    Layout(0, data=2), Layout(1, pipeline=2), Layout(2, tensor=2), Layout(3, data=4), Layout(0, pipeline=2, tensor=2),
    Layout(1, data=2, tensor=2),
)  # fmt: skip


@pytest.mark.parametrize("where", LAYOUTS, ids=lambda where: where.name)
def test_a_layout_loads_writes_the_same_and_goes_on(trainer: Trainer, source: Source, where: Layout) -> None:
    assert reshape.one_layout(trainer, source, where) < TOLERANCE


@pytest.mark.parametrize(
    ("first", "second"),
    [(Layout(3, data=2), Layout(1, pipeline=2, tensor=2)), (Layout(2, data=1, tensor=2), Layout(3, data=2))],
    ids=lambda where: where.name,
)
def test_one_layout_goes_on_from_another(trainer: Trainer, source: Source, first: Layout, second: Layout) -> None:
    assert reshape.one_pair(trainer, source, first, second) < TOLERANCE


def test_all_legal_layouts_are_known(trainer: Trainer) -> None:
    """What the sweep covers: 8 of ZeRO-0 and as many of ZeRO-1, 5 of ZeRO-2, 3 of ZeRO-3."""
    refused = {where: reshape.refusal(trainer, where) for where in reshape.candidates()}
    legal = [where.zero for where, reason in refused.items() if reason is None]
    assert [legal.count(stage) for stage in range(4)] == [8, 8, 5, 3]
    reasons = [reason for reason in refused.values() if reason is not None]
    assert all("pipeline engine keeps whole" in reason or "tensor ranks" in reason for reason in reasons), reasons
