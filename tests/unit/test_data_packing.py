"""Documents in samples: nothing lost, nothing twice, positions, boundaries and targets, against a slow reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.data import DataConfig
from trainer.core.targets import IGNORE_INDEX
from trainer.data.batches import MicroBatch
from trainer.data.best_fit import BestFit, pack
from trainer.data.loader import TrainLoader
from trainer.data.packing import DocumentStream, OnePerSequence
from trainer.data.shard_set import ShardSet
from trainer.data.shards import ShardWriter

pytestmark = pytest.mark.fast
S = 16


def write(path: Path, lengths: list[int]) -> str:
    """Token j of document i is 100 * (i + 1) + j: a token says where it comes from, and none is 0 (padding)."""
    with ShardWriter(path, 10**6) as writer:
        for i, length in enumerate(lengths):
            writer.add(100 * (i + 1) + np.arange(length))
    return str(path)


def lengths_of(seed: int, count: int, longest: int = 60) -> list[int]:
    return np.random.default_rng(seed).integers(1, longest, count).tolist()


def rows_of(packing: DocumentStream | BestFit | OnePerSequence) -> tuple[np.ndarray, list[list[tuple[int, ...]]]]:
    """Every row of a source, and its pieces as (column, length, document, start)."""
    samples = np.arange(packing.num_samples)
    out = np.full((samples.size, S + 1), -1, dtype=np.int64)
    segments = packing.fill(samples, out, None, True)
    assert segments is not None
    pieces: list[list[tuple[int, ...]]] = [[] for _ in samples]
    columns = (segments.columns, segments.lengths, segments.documents, segments.starts)
    for row, *piece in zip(segments.rows.tolist(), *(values.tolist() for values in columns), strict=True):
        pieces[row].append(tuple(piece))
    return out, pieces


@pytest.mark.parametrize("count", [1, 3, 255, 256, 257, 700])
def test_best_fit_trains_every_token_but_the_first_once(tmp_path: Path, count: int) -> None:
    lengths = lengths_of(count, count)
    packing = BestFit(ShardSet(write(tmp_path / "a", lengths)), S)
    rows, pieces = rows_of(packing)
    targets: list[int] = []
    for row, parts in zip(rows, pieces, strict=True):
        end = 0
        for column, length, document, _ in parts:
            assert column == end, "pieces lie one after the other"
            end = column + length
            piece = row[column:end].tolist()
            assert piece == list(range(piece[0], piece[0] + length))
            assert piece[0] // 100 == document + 1
            targets += piece[1:]
        assert end <= S + 1
        assert (row[end:] == 0).all()
    expected = [100 * (i + 1) + j for i, length in enumerate(lengths) for j in range(1, length)]
    assert sorted(targets) == expected


def test_best_fit_cuts_only_what_is_longer_than_a_sample(tmp_path: Path) -> None:
    lengths = [S + 1, S + 2, 5, 2 * S + 1, 2 * S + 2, 1]
    _, pieces = rows_of(BestFit(ShardSet(write(tmp_path / "a", lengths)), S))
    per_document = {d: sorted(p[1] for parts in pieces for p in parts if p[2] == d) for d in range(6)}
    assert per_document == {0: [17], 1: [2, 17], 2: [5], 3: [17, 17], 4: [2, 17, 17], 5: []}


def test_samples_in_any_order_are_the_same(tmp_path: Path) -> None:
    packing = BestFit(ShardSet(write(tmp_path / "a", lengths_of(0, 900))), S)
    rows, _ = rows_of(packing)
    samples = np.random.default_rng(0).permutation(packing.num_samples)[:97]
    out = np.empty((97, S + 1), dtype=np.int64)
    packing.fill(samples, out, None, False)
    assert out.tolist() == rows[samples].tolist()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 20), min_size=12, max_size=12), min_size=1, max_size=4))
def test_packing_equals_best_fit_decreasing_one_by_one(windows: list[list[int]]) -> None:
    bins, used = pack(np.array(windows), 20)
    for w, lengths in enumerate(windows):
        room: list[int] = []
        for i in sorted((i for i in range(12) if lengths[i]), key=lambda i: (-lengths[i], i)):
            fitting = [b for b in range(len(room)) if room[b] >= lengths[i]]
            best = min(fitting, key=lambda b: (room[b], b)) if fitting else len(room)
            if not fitting:
                room.append(20)
            room[best] -= lengths[i]
            assert bins[w, i] == best
        assert used[w] == len(room)


def test_best_fit_wastes_little_on_real_lengths(tmp_path: Path) -> None:
    lengths = np.minimum(np.random.default_rng(0).lognormal(2.2, 1.0, 5000).astype(int) + 1, 99).tolist()
    packing = BestFit(ShardSet(write(tmp_path / "a", lengths)), S)
    used = packing.segments(np.arange(packing.num_samples)).lengths.sum()
    assert 0.97 < used / (packing.num_samples * (S + 1)) <= 1


def test_one_per_sequence(tmp_path: Path) -> None:
    rows, pieces = rows_of(OnePerSequence(ShardSet(write(tmp_path / "a", [3, 40, 17, 16])), S))
    assert [parts[0][:3] for parts in pieces] == [(0, 3, 0), (0, 17, 1), (0, 17, 2), (0, 16, 3)]
    assert rows[0].tolist() == [100, 101, 102] + [0] * 14
    assert rows[1].tolist() == list(range(200, 217))


def batches(path: str, steps: int, **data: object) -> list[MicroBatch]:
    section = {"train": [{"path": path}], "sequence_length": S, "workers": 0, **data}
    loader = TrainLoader(DataConfig.model_validate(section), 0, 8, 4, 0, 1)
    found = [batch for _ in range(steps) for batch in loader.next_step()]
    loader.close()
    return found


@pytest.mark.parametrize("packing", ["documents", "best_fit", "one_per_sequence"])
@pytest.mark.parametrize("boundary_loss", [True, False])
def test_positions_documents_and_targets(tmp_path: Path, packing: str, boundary_loss: bool) -> None:
    path = write(tmp_path / "a", lengths_of(1, 120))
    for batch in batches(path, 4, packing=packing, mask_documents=True, boundary_loss=boundary_loss):
        assert batch.position_ids is not None
        assert batch.document_ids is not None
        for ids, targets, positions, documents in zip(
            batch.input_ids.tolist(), batch.targets.tolist(), batch.position_ids.tolist(), batch.document_ids.tolist(),
            strict=True,
        ):  # fmt: skip
            number, start = 0, 0
            for column in range(S):
                token, target = ids[column], targets[column]
                if column and (token != ids[column - 1] + 1) and (token or ids[column - 1]):
                    number, start = number + 1, column
                assert (documents[column], positions[column]) == (number, column - start)
                following = ids[column + 1] if column + 1 < S else target
                if token and following == token + 1:
                    assert target == following, "inside a document"
                elif token == 0 or following == 0 or not boundary_loss:
                    assert target == IGNORE_INDEX, "padding, or a boundary that isn't trained"
                else:
                    assert target in (following, IGNORE_INDEX if column == S - 1 else following)


def test_masks_are_never_square(tmp_path: Path) -> None:
    batch = batches(write(tmp_path / "a", lengths_of(1, 120)), 1, mask_documents=True)[0]
    sizes = [t.numel() for t in vars(batch).values() if isinstance(t, torch.Tensor)]
    assert max(sizes) == 4 * S
    lengths = batch.cumulative_lengths
    assert batch.position_ids is not None
    assert lengths[0] == 0
    assert lengths[-1] == 4 * S
    assert (batch.position_ids.flatten()[lengths[:-1].long()] == 0).all()


def test_a_run_without_masks_is_given_none(tmp_path: Path) -> None:
    batch = batches(write(tmp_path / "a", lengths_of(1, 120)), 1)[0]
    assert batch.position_ids is batch.document_ids is None
    assert (batch.targets != IGNORE_INDEX).all()


def test_corrupt_sequences_are_left_out_and_counted(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a", 30000, block_bytes=512) as writer:
        writer.add(np.arange(1 + 64 * S))
    section = {"train": [{"path": str(tmp_path / "a")}], "sequence_length": S, "on_corrupt": "skip", "workers": 0}
    with open(tmp_path / "a.bin", "r+b") as file:
        file.seek(600)
        file.write(b"\xff")
    data = DataConfig.model_validate(section | {"integrity": "full"})
    loaders = [TrainLoader(data, 0, 8, 4, rank, 2) for rank in range(2)]
    found = [block for rank, loader in enumerate(loaders) for block in loader.check_blocks(rank, 2)]
    assert len(found) == 1
    for loader in loaders:
        loader.exclude(found)
    rows = [batch for _ in range(8) for loader in loaders for batch in loader.next_step()]
    # Block 1 holds tokens 256..512: the 16 samples inside it and the one whose last token is its first.
    assert sum(batch.num_corrupt for batch in rows) == 17
    for batch in rows:
        out = (batch.targets == IGNORE_INDEX).all(dim=1)
        assert int(out.sum()) == batch.num_corrupt
        assert (batch.input_ids[out] == 0).all()
