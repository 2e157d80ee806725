"""Megatron's own reader and writer (megatron-core) against ours, and five of its defects that we don't share."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.core.errors import DataError
from trainer.data.encoder import Encoder
from trainer.data.shard_copy import Labels, merge
from trainer.data.shard_set import ShardSet
from trainer.data.shard_verify import verify_source
from trainer.data.shards import ShardWriter, TokenShards
from trainer.data.tokenize import tokenize
from trainer.data.tokenizer import train_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # importing megatron-core gives twenty
CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


def megatron() -> Any:
    """Imported when a test runs: it takes seconds. It is required, so its absence is a failure, not a skip."""
    import megatron.core.datasets.indexed_dataset as module

    return module


def write_with_megatron(prefix: Path, documents: list[list[list[int]]], dtype: type = np.uint16) -> str:
    """``documents`` are lists of sequences."""
    builder = megatron().IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i, module in enumerate((os, subprocess, textwrap)):
        (folder / f"{i}.py").write_text(
            Path(str(module.__file__)).read_text(encoding="utf-8")[:20000], encoding="utf-8"
        )
    (folder / "3.txt").write_text("床前明月光，疑是地上霜。举头望明月，低头思故乡。\n" * 20, encoding="utf-8")
    (folder / "4.txt").write_text("🚀👩‍👩‍👧‍👦 \t emoji\r\n and   spaces 🎉\n" * 20, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([str(texts)], str(folder / "t"), 2000, "bpe")
    return str(folder / "t")


def widen(tokenizer: str, target: Path) -> str:
    """Give a tokenizer more than 65,500 ids, so that int32 is stored."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.add_tokens([f"<extra_{i}>" for i in range(66000)])
    loaded.save_pretrained(target)
    return str(target)


@pytest.mark.parametrize("wide", [False, True])
def test_megatron_reads_our_shards_document_by_document(
    texts: Path, tokenizer: str, tmp_path: Path, wide: bool
) -> None:
    path = widen(tokenizer, tmp_path / "wide") if wide else tokenizer
    tokenize([str(texts)], path, str(tmp_path / "a"), workers=1)
    encoder = Encoder.load(path)
    expected = [
        [*encoder.encode_batch([file.read_bytes().decode()])[0], encoder.eos_id] for file in sorted(texts.iterdir())
    ]
    for mmap in (True, False):
        dataset = megatron().IndexedDataset(str(tmp_path / "a"), mmap=mmap)
        assert len(dataset) == len(expected) == 5
        assert dataset.index.dtype == (np.int32 if wide else np.uint16)
        assert dataset.document_indices.tolist() == list(range(6))
        for i, ids in enumerate(expected):
            assert dataset[i].tolist() == ids


@pytest.mark.parametrize("code", CODES)
def test_we_read_megatrons_shards_document_by_document(tmp_path: Path, code: int) -> None:
    documents = [[[1, 2, 3], [4]], [[5, 6]], [[7], [8, 9, 10], [11]]]
    path = write_with_megatron(tmp_path / "m", documents, CODES[code])
    shards, source = TokenShards(path), ShardSet(path)
    assert shards.header.code == code
    flat = [[token for sequence in document for token in sequence] for document in documents]
    assert [shards.documents(i).tolist() for i in range(3)] == flat
    starts, lengths = source.document_spans(np.arange(3))
    assert [source.read(a, b).tolist() for a, b in zip(starts.tolist(), lengths.tolist(), strict=True)] == flat
    assert verify_source(path, full=True) == []


def test_our_bytes_are_megatrons_bytes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    documents = [random.integers(0, 60000, int(random.integers(1, 50))).tolist() for _ in range(100)]
    write_with_megatron(tmp_path / "theirs", [[document] for document in documents])
    with ShardWriter(tmp_path / "ours", 60000) as writer:
        for document in documents:
            writer.add(document)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_convert_gives_foreign_shards_a_side_car(tmp_path: Path) -> None:
    path = write_with_megatron(tmp_path / "m", [[[1, 2], [0]], [[5, 0]], [[7, 0]]], np.int32)
    merge([path], str(tmp_path / "ours"), labels=Labels(vocab_size=100, end_of_document_id=0))
    found = ShardSet(str(tmp_path / "ours"))
    assert (found.vocab_size, found.end_of_document_id, found.shards[0].dtype.name) == (100, 0, "uint16")
    assert found.read(0, 7).tolist() == [1, 2, 0, 5, 0, 7, 0]
    assert found.document_lengths(0, 3).tolist() == [3, 2, 2]
    with pytest.raises(DataError, match="doesn't say how large its vocabulary is"):
        merge([path], str(tmp_path / "x"))
    with pytest.raises(DataError, match=r"token 3 .* = 5: token id outside 0\.\.4"):
        merge([path], str(tmp_path / "x"), labels=Labels(vocab_size=5))
    assert not list(tmp_path.glob("x*"))


def test_split_then_merge_gives_the_same_bytes_back(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    with ShardWriter(tmp_path / "a", 1000, end_of_document_id=0) as writer:
        for _ in range(200):
            writer.add(np.append(random.integers(1, 1000, int(random.integers(1, 60))), 0))
    merge([str(tmp_path / "a")], str(tmp_path / "parts"), shard_bytes=1000)
    parts = ShardSet(str(tmp_path / "parts"))
    assert parts.num_shards > 10
    assert all(os.path.getsize(shard.tokens_path) <= 1000 for shard in parts.shards)
    merge([str(tmp_path / "parts")], str(tmp_path / "b"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    merge([str(tmp_path / "a")], str(tmp_path / "parts"), shard_bytes=5000, overwrite=True)
    assert len(list(tmp_path.glob("parts-*.bin"))) == ShardSet(str(tmp_path / "parts")).num_shards
    with pytest.raises(DataError, match="exists already"):
        merge([str(tmp_path / "a")], str(tmp_path / "parts"), shard_bytes=5000)


def test_defect_1_an_id_too_large_for_uint16_is_stored_as_another(tmp_path: Path) -> None:
    path = write_with_megatron(tmp_path / "theirs", [[[70000]]], np.uint16)
    dataset = megatron().IndexedDataset(path)
    assert dataset[0].tolist() == [4464]
    with pytest.raises(DataError, match=r"document 0 = 70000: has a token id outside 0\.\.59999"):
        ShardWriter(tmp_path / "ours", 60000).add(torch.tensor([70000]).numpy())
    with pytest.raises(DataError, match=r"document 0 = 70000: has a token id outside 0\.\.59999"):
        ShardWriter(tmp_path / "too", 60000).add(torch.tensor([70000]))  # type: ignore[arg-type]


def test_defect_2_a_truncated_file_is_read_as_what_memory_holds(tmp_path: Path) -> None:
    path = write_with_megatron(tmp_path / "m", [[[1] * 500], [[2] * 500]])
    os.truncate(path + ".bin", 1200)
    dataset = megatron().IndexedDataset(path, mmap=False)
    assert len(dataset[1]) == 500, "400 of them were never in the file"
    with pytest.raises(DataError, match=r"m\.bin = '1200 bytes': has the wrong size: the index ends at byte 2000"):
        ShardSet(path)


def test_defect_3_a_flipped_byte_is_served_as_data(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a", 60000, block_bytes=256) as writer:
        writer.add(np.arange(1000))
    with open(tmp_path / "a.bin", "r+b") as file:
        file.seek(600)
        file.write(b"\xff")
    dataset = megatron().IndexedDataset(str(tmp_path / "a"))
    assert dataset[0][300] == 511
    problems = verify_source(str(tmp_path / "a"), full=True)
    assert [str(p.key) for p in problems] == [f"{tmp_path / 'a.bin'} bytes 512..768"]
    assert ShardSet(str(tmp_path / "a")).check_blocks(0, 1, full=True)[0][:2] == (0, 2)


def test_defect_4_an_array_must_outlive_its_reader(tmp_path: Path) -> None:
    path = write_with_megatron(tmp_path / "m", [[list(range(5000))]])
    theirs = f"""
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        array = IndexedDataset({path!r})[0]
        print(int(array.sum()))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(theirs)], capture_output=True, check=False)
    assert done.returncode == -11, done.stderr
    source = ShardSet(path)
    array = source.read(0, 5000)
    source.close()
    del source
    assert int(array.sum()) == sum(range(5000))


def test_defect_5_memory_of_the_writer_does_not_grow_with_documents(tmp_path: Path) -> None:
    tokens, lengths = np.ones(200_000, dtype=np.int64), np.ones(200_000, dtype=np.int64)
    with ShardWriter(tmp_path / "a", 100) as writer:
        for _ in range(3):
            writer.add_many(tokens, lengths)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(47):
            writer.add_many(tokens, lengths)
        writer.commit()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert TokenShards(tmp_path / "a").num_documents == 10_000_000
    assert grown < 30_000, "10 million documents; Megatron's builder keeps two Python integers of each"
