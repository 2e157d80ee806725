"""Parts of tensors: what is cut is put back, and checkpoints are read in other parts than they hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed

from trainer.checkpoint import layout
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.writer import CheckpointWriter
from trainer.config.checkpoint import CheckpointConfig
from trainer.core.errors import CheckpointError
from trainer.engine.base import StateSlice
from trainer.parallel.cut import Cut


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


WHOLE = torch.arange(4 * 12.0).view(4, 12)


@pytest.mark.parametrize(("dim", "parts", "chunks"), [(0, 2, 1), (1, 2, 1), (1, 4, 3), (0, 4, 1), (0, 1, 2)])
def test_parts_make_up_the_whole(dim: int, parts: int, chunks: int) -> None:
    found = torch.full_like(WHOLE, torch.nan)
    for part in range(parts):
        cut = Cut(dim, part, parts, chunks)
        piece = cut.take(WHOLE)
        assert tuple(piece.shape) == cut.part_shape(tuple(WHOLE.shape))
        assert cut.whole_shape(tuple(piece.shape)) == tuple(WHOLE.shape)
        cut.put(piece, found)
    assert torch.equal(found, WHOLE)


def test_chunks_are_cut_one_by_one() -> None:
    assert Cut(1, 0, 2, 3).take(WHOLE)[0].tolist() == [0, 1, 4, 5, 8, 9]


def test_a_dim_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="12 can't be divided into 1 x 5"):
        Cut(1, 0, 5).take(WHOLE)


def saved(writer: CheckpointWriter, piece: StateSlice) -> Path:
    done = writer.save(1, [piece], {"state": {}, "model": {}}, wait=True)
    assert done is not None
    assert done.error is None
    return done.directory


def written(tmp_path: Path, cut: Cut) -> CheckpointReader:
    """A checkpoint that holds one part of WHOLE."""
    writer = CheckpointWriter(tmp_path, attempt="0001", settings=CheckpointConfig(keep_last=9))
    part = StateSlice("w", "weight", (4, 12), 0, cut.take(WHOLE).view(-1), primary=True, cut=cut)
    return CheckpointReader(saved(writer, part))


def test_a_part_is_read_as_it_is_held_or_out_of_the_whole(tmp_path: Path) -> None:
    cut = Cut(1, 1, 2, 3)
    reader = written(tmp_path, cut)
    assert reader.read("w", "weight", 2, 5, cut).tolist() == cut.take(WHOLE).flatten()[2:7].tolist()
    assert layout.read_manifest(reader.directory)["version"] == layout.VERSION_WITH_CUTS  # type: ignore[index]


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    reader = written(tmp_path, Cut(1, 1, 2))
    with pytest.raises(CheckpointError, match="parts of 'w' 'weight' are missing"):
        reader.whole("w")


def test_whole_tensors_are_written_as_older_trainers_read_them(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, attempt="0001", settings=CheckpointConfig(keep_last=9))
    path = saved(writer, StateSlice("w", "weight", (4, 12), 0, WHOLE.view(-1), primary=True))
    assert layout.read_manifest(path)["version"] == layout.VERSION_WITHOUT_CUTS  # type: ignore[index]
    cut = Cut(1, 1, 2)
    assert torch.equal(CheckpointReader(path).read("w", "weight", 0, 24, cut).view(4, 6), cut.take(WHOLE))
