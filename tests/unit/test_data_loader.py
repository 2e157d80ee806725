"""Micro-batches of a rank: the same global batch for any layout, resume by one integer, faults surface."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.config.data import DataConfig
from trainer.config.parallel import BatchWarmupConfig
from trainer.core.errors import DataError
from trainer.core.targets import IGNORE_INDEX
from trainer.data.loader import TrainLoader, validation_batches
from trainer.data.shards import ShardWriter

pytestmark = pytest.mark.fast
S = 8


def shards(path: Path, num_tokens: int, offset: int = 0, vocab_size: int = 30000, **options: object) -> str:
    """Token i of the stream is ``offset + i``, so a batch says where it came from."""
    with ShardWriter(path, vocab_size, **options) as writer:  # type: ignore[arg-type]
        writer.add(np.arange(offset, offset + num_tokens))
    return str(path)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("shards")
    return [shards(folder / "a", 801), shards(folder / "b", 405, offset=10000)]


def config(paths: list[str], workers: int = 0, length: int = S) -> DataConfig:
    train = [{"path": path, "weight": 2.0 - i, "name": f"source{i}"} for i, path in enumerate(paths)]
    return DataConfig.model_validate({"train": train, "sequence_length": length, "workers": workers})


def drain(loader: TrainLoader, steps: int) -> None:
    for _ in range(steps):
        loader.next_step()


def global_batches(
    paths: list[str], data_size: int, micro: int, workers: int = 0, steps: int = 12, consumed: int = 0, size: int = 8
) -> list[list[list[int]]]:
    """The rows of each step's global batch, in the order of their sample numbers."""
    loaders = [
        TrainLoader(config(paths, workers), 5, size, micro, rank, data_size, consumed) for rank in range(data_size)
    ]
    result = []
    for _ in range(steps):
        rows: dict[int, list[int]] = {}
        for loader in loaders:
            numbers = loader.sample_numbers()
            batches = loader.next_step()
            assert len(batches) == len(numbers) == size // (micro * data_size)
            for batch, of_batch in zip(batches, numbers, strict=True):
                assert batch.input_ids.shape == batch.targets.shape == (micro, S)
                assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
                assert batch.input_ids.data_ptr() + 8 * micro * S <= batch.targets.data_ptr() or (
                    batch.targets.data_ptr() + 8 * micro * S <= batch.input_ids.data_ptr()
                ), "they share memory"
                whole = torch.cat([batch.input_ids, batch.targets[:, -1:]], dim=1)
                assert torch.equal(whole[:, 1:], batch.targets)
                rows |= dict(zip(of_batch.tolist(), whole.tolist(), strict=True))
        result.append([rows[number] for number in sorted(rows)])
        assert len(rows) == size
    for loader in loaders:
        assert loader.consumed_samples == consumed + steps * size
        loader.close()
    return result


@pytest.mark.parametrize(
    ("data_size", "micro", "workers"), [(1, 8, 0), (1, 1, 2), (2, 1, 0), (2, 4, 3), (4, 2, 0), (4, 1, 1)]
)
def test_the_global_batch_is_the_same_for_every_layout(
    paths: list[str], data_size: int, micro: int, workers: int
) -> None:
    expected = global_batches(paths, 1, 2)
    assert global_batches(paths, data_size, micro, workers) == expected
    rows = [row for step in expected for row in step]
    assert all(row == list(range(row[0], row[0] + S + 1)) for row in rows)
    assert {row[0] >= 10000 for row in rows} == {True, False}


def test_micro_batch_m_of_rank_r_holds_the_documented_samples(paths: list[str]) -> None:
    loader = TrainLoader(config(paths), 0, 12, 2, data_rank=1, data_size=3, consumed_samples=24)
    assert loader.sample_numbers().tolist() == [[26, 27], [32, 33]]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_needs_one_integer(paths: list[str], workers: int) -> None:
    whole = global_batches(paths, 1, 2, steps=30)  # crosses the epochs of both sources
    assert global_batches(paths, 2, 2, workers, steps=17, consumed=13 * 8) == whole[13:]


def test_global_size_may_change_at_a_resume(paths: list[str]) -> None:
    small = [row for step in global_batches(paths, 1, 1, steps=6, size=4) for row in step]
    large = [row for step in global_batches(paths, 1, 1, steps=2, size=8, consumed=8) for row in step]
    assert large == small[8:24]


def warm_batches(
    paths: list[str], data_size: int, micro: int, workers: int, done: int = 0, consumed: int = 0
) -> list[list[tuple[int, list[int]]]]:
    """(sample number, row) of 9 steps of 4, 4, 4, 8, 8, 12, 12, 12, 12 sequences, or of those that are left."""
    warmup = BatchWarmupConfig(start_size=4, increment=4, steps=5)
    loaders = [
        TrainLoader(config(paths, workers), 5, 12, micro, rank, data_size, consumed, None, warmup, done)
        for rank in range(data_size)
    ]
    result = []
    for _ in range(done, 9):
        rows: list[tuple[int, list[int]]] = []
        for loader in loaders:
            numbers = loader.sample_numbers()
            batches = loader.next_step()
            assert [len(batch.input_ids) for batch in batches] == [micro] * len(numbers)
            rows += zip(numbers.ravel().tolist(), torch.cat([b.input_ids for b in batches]).tolist(), strict=True)
        result.append(sorted(rows))
    for loader in loaders:
        assert loader.consumed_samples == 76
        loader.close()
    return result


@pytest.mark.parametrize("planned", [1024, 10, 1])
@pytest.mark.parametrize(("data_size", "micro", "workers"), [(1, 4, 0), (1, 1, 3), (2, 2, 2), (4, 1, 0)])
def test_a_warm_up_cuts_the_same_samples_into_other_steps(
    paths: list[str], monkeypatch: pytest.MonkeyPatch, data_size: int, micro: int, workers: int, planned: int
) -> None:
    monkeypatch.setattr("trainer.data.loader._PLANNED_SAMPLES", planned)
    found = warm_batches(paths, data_size, micro, workers)
    assert [len(rows) for rows in found] == [4, 4, 4, 8, 8, 12, 12, 12, 12]
    samples = [sample for rows in found for sample, _ in rows]
    assert samples == list(range(76))
    plain = global_batches(paths, 1, 1, steps=19, size=4)
    assert [row for rows in found for _, row in rows] == [row[:-1] for step in plain for row in step]
    for done, consumed in ((2, 8), (4, 20), (6, 40)):
        assert warm_batches(paths, data_size, micro, workers, done, consumed) == found[done:]


def test_a_size_of_the_warm_up_that_does_not_divide_is_refused(paths: list[str]) -> None:
    warmup = BatchWarmupConfig(start_size=2, increment=3, steps=4)
    loader = TrainLoader(config(paths), 0, 8, 1, 0, 2, warmup=warmup)
    with pytest.raises(DataError, match=r"batch\.global_size = 5"):
        drain(loader, 3)


def test_fingerprint_ignores_layout_and_sees_content(paths: list[str], tmp_path: Path) -> None:
    one = TrainLoader(config(paths), 0, 8, 1, 0, 1)
    other = TrainLoader(config(paths, workers=1), 9, 16, 2, 1, 2)
    assert one.sampler.fingerprint(0) == other.sampler.fingerprint(0)
    other.close()
    changed = TrainLoader(config([shards(tmp_path / "c", 801, 1), paths[1]]), 0, 8, 1, 0, 1)
    assert changed.sampler.fingerprint(0) != one.sampler.fingerprint(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_id_the_model_has_no_row_for_is_placed(tmp_path: Path, workers: int) -> None:
    path = shards(tmp_path / "a", 401)
    (tmp_path / "a.json").unlink()
    # Damaged after opening, which looks at all ids of so small a file. Two epochs are read: all of it once more.
    loader = TrainLoader(config([path], workers), 0, 2, 2, 0, 1, vocab_size=500)
    with open(f"{path}.bin", "r+b") as file:
        file.seek(2 * 300)
        file.write((29999).to_bytes(2, "little"))
    with pytest.raises(DataError, match=r"a\.bin at token 300 \(byte 600\) = 29999"):
        drain(loader, 25)
    loader.close()


def test_negative_ids_are_refused_without_a_vocabulary(tmp_path: Path) -> None:
    path = shards(tmp_path / "a", 41, vocab_size=70000)
    (tmp_path / "a.json").unlink()
    with open(f"{path}.bin", "r+b") as file:
        file.write((-1).to_bytes(4, "little", signed=True))
    with pytest.raises(DataError, match="at token 0"):
        next(validation_batches(config([path]), path, 1, 0, 1, 1))


def test_a_failure_in_the_thread_surfaces_and_stays(paths: list[str], tmp_path: Path) -> None:
    path = shards(tmp_path / "a", 401)
    loader = TrainLoader(config([path], workers=2), 0, 2, 2, 0, 1)
    loader.next_step()
    with open(f"{path}.bin", "r+b") as file:
        file.truncate(0)
    for _ in range(2):
        with pytest.raises(DataError, match="has become shorter"):
            drain(loader, 10)
    loader.close()


@pytest.mark.parametrize("steps", [1, 5])
def test_close_ends_the_thread(paths: list[str], steps: int) -> None:
    before = threading.active_count()
    loader = TrainLoader(config(paths, workers=2), 0, 8, 1, 0, 1)
    for _ in range(steps):
        loader.next_step()
    assert threading.active_count() == before + (steps > 0)
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="closed"):
        loader.next_step()


def two_tokenizers(folder: Path) -> DataConfig:
    return config([shards(folder / "x", 801, tokenizer_hash="1"), shards(folder / "y", 801, tokenizer_hash="2")])


REFUSED: dict[str, tuple[Callable[[Path], DataConfig], str]] = {
    "missing": (lambda d: config([str(d / "no"), str(d / "neither")]), "4 problems"),
    "twice": (lambda d: config([shards(d / "x", 801)] * 2), "holds the same tokens as"),
    "tokenizers": (two_tokenizers, "different tokenizers"),
    "vocabulary": (lambda d: config([shards(d / "x", 801, vocab_size=50001)]), "larger vocabulary"),
    "too short": (lambda d: config([shards(d / "x", 8)]), "too short for one sample"),
    "fewer than a batch": (lambda d: config([shards(d / "x", 7 * S + 1)]), "must not exceed the 7 samples"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_sources_that_cannot_be_used(tmp_path: Path, name: str) -> None:
    build, message = REFUSED[name]
    with pytest.raises(DataError) as caught:
        TrainLoader(build(tmp_path), 0, 8, 1, 0, 1, vocab_size=50000)
    assert message in str(caught.value)


def test_a_batch_that_does_not_divide_is_refused(paths: list[str]) -> None:
    with pytest.raises(DataError, match=r"batch\.global_size = 9"):
        TrainLoader(config(paths), 0, 9, 2, 0, 2)


def validate(
    path: str, micro: int, data_size: int, size: int, batches: int | None = None
) -> tuple[list[int], list[int]]:
    """Return (first token of every evaluated row in global order, micro-batches of each rank)."""
    per_rank = [
        list(validation_batches(config([path]), path, micro, r, data_size, size, batches)) for r in range(data_size)
    ]
    rows: list[int] = []
    for position in range(len(per_rank[0])):
        for rank in range(data_size):
            batch = per_rank[rank][position]
            assert batch.input_ids.shape == batch.targets.shape == (micro, S)
            for ids, targets in zip(batch.input_ids, batch.targets, strict=True):
                if (targets == IGNORE_INDEX).all():
                    continue
                assert targets.tolist() == list(range(int(ids[0]) + 1, int(ids[0]) + S + 1))
                rows.append(int(ids[0]))
    return rows, [len(batches) for batches in per_rank]


@pytest.mark.parametrize(
    ("micro", "data_size", "size"), [(1, 1, 1), (2, 1, 8), (1, 4, 8), (4, 2, 8), (3, 1, 3), (50, 1, 50)]
)
def test_validation_covers_every_sample_once_in_order(tmp_path: Path, micro: int, data_size: int, size: int) -> None:
    path = shards(tmp_path / "v", 21 * S + 5)
    rows, counts = validate(path, micro, data_size, size)
    assert rows == [S * i for i in range(21)]
    assert counts == [-(-21 // size) * size // (micro * data_size)] * data_size


@pytest.mark.parametrize(("batches", "expected"), [(1, 8), (2, 16), (3, 21), (99, 21)])
def test_validation_may_be_cut_short(tmp_path: Path, batches: int, expected: int) -> None:
    path = shards(tmp_path / "v", 21 * S + 1)
    rows, counts = validate(path, 2, 2, 8, batches)
    assert rows == [S * i for i in range(expected)]
    assert counts == [min(batches, 3) * 2] * 2


def test_validation_refuses_at_the_call(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too short"):
        validation_batches(config(["v"]), shards(tmp_path / "v", S), 1, 0, 1, 1)
    with pytest.raises(DataError, match="larger vocabulary"):
        validation_batches(config(["w"]), shards(tmp_path / "w", 100), 1, 0, 1, 1, vocab_size=10)
    with pytest.raises(DataError, match="doesn't exist"):
        validation_batches(config(["x"]), str(tmp_path / "x"), 1, 0, 1, 1)
