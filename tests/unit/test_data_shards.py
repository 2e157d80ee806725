"""Token shards: the bytes Megatron defines, what is written comes back, what can't be stored is refused."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.core.errors import DataError
from trainer.data.shards import ShardWriter, TokenShards, verify

pytestmark = pytest.mark.fast


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 1000, **options: object) -> str:
    with ShardWriter(prefix, vocab_size, **options) as writer:  # type: ignore[arg-type]
        for document in documents:
            writer.add(document)
    return str(prefix)


def test_three_documents_have_the_102_bytes_of_megatron(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11, 12]])
    expected = bytes.fromhex(
        "4d4d49444944580000"  # magic
        "0100000000000000"  # version
        "08"  # uint16
        "0300000000000000"  # sequences
        "0400000000000000"  # entries of the document index
        "040000000300000005000000"  # lengths
        "0000000000000000"
        "0800000000000000"
        "0e00000000000000"  # byte offsets
        "0000000000000000"
        "0100000000000000"
        "0200000000000000"
        "0300000000000000"  # document index
    )
    assert len(expected) == 102
    assert (tmp_path / "a.idx").read_bytes() == expected
    assert (tmp_path / "a.bin").read_bytes() == np.arange(1, 13, dtype="<u2").tobytes()


@pytest.mark.parametrize(
    ("vocab_size", "code", "name"), [(65499, 8, "uint16"), (65500, 4, "int32"), (70001, 4, "int32")]
)
def test_dtype_follows_megatrons_rule(tmp_path: Path, vocab_size: int, code: int, name: str) -> None:
    write(tmp_path / "a", [[0, vocab_size - 1]], vocab_size)
    assert (tmp_path / "a.idx").read_bytes()[17] == code
    shards = TokenShards(tmp_path / "a")
    assert shards.dtype.name == name
    assert shards.read(0, 2).tolist() == [0, vocab_size - 1]


documents_strategy = st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=20), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(documents=documents_strategy, data=st.data(), block_bytes=st.sampled_from([2, 6, 64, 4096]))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], data: st.DataObject, block_bytes: int
) -> None:
    prefix = write(tmp_path_factory.mktemp("shards") / "a", documents, block_bytes=block_bytes)
    shards = TokenShards(prefix)
    stream = [token for document in documents for token in document]
    assert (shards.num_tokens, shards.num_documents) == (len(stream), len(documents))
    assert [shards.documents(i).tolist() for i in range(len(documents))] == documents
    start = data.draw(st.integers(0, len(stream)))
    count = data.draw(st.integers(0, len(stream) - start))
    assert shards.read(start, count).tolist() == stream[start : start + count]
    assert verify(prefix, full=True) == []


def test_many_documents_at_once_equal_one_by_one(tmp_path: Path) -> None:
    documents = [[1, 2], [3], [4, 5, 6]]
    write(tmp_path / "one", documents)
    with ShardWriter(tmp_path / "many", 1000) as writer:
        writer.add_many(np.array([1, 2, 3]), [2, 1])
        writer.add_many(np.array([4, 5, 6], dtype=np.int32), np.array([3]))
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"many{suffix}").read_bytes()


def test_side_car_and_fingerprint(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[1, 2], [3, 2]], end_of_document_id=2, tokenizer_name="t", tokenizer_hash="ab")
    side_car = json.loads((tmp_path / "a.json").read_text())
    assert side_car["format"] == "trainer-token-shards"
    assert (side_car["version"], side_car["num_tokens"], side_car["num_documents"]) == (1, 4, 2)
    assert (side_car["dtype"], side_car["vocab_size"], side_car["end_of_document_id"]) == ("uint16", 1000, 2)
    assert side_car["tokenizer"] == {"name": "t", "hash": "ab"}
    assert side_car["blocks"]["algorithm"] == "xxh3_64"
    shards = TokenShards(prefix)
    assert (shards.vocab_size, shards.end_of_document_id, shards.tokenizer_hash) == (1000, 2, "ab")
    assert shards.fingerprint == side_car["fingerprint"]
    assert shards.notes == ()
    assert TokenShards(write(tmp_path / "elsewhere", [[1, 2], [3, 2]])).fingerprint == shards.fingerprint
    assert TokenShards(write(tmp_path / "other", [[1, 2], [4, 2]])).fingerprint != shards.fingerprint
    assert TokenShards(write(tmp_path / "cut", [[1, 2, 3], [2]])).fingerprint != shards.fingerprint


def test_shards_made_elsewhere_are_read_with_a_note(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[1, 2], [3, 4, 5]])
    ours = TokenShards(prefix).fingerprint
    (tmp_path / "a.json").unlink()
    shards = TokenShards(prefix)
    assert (shards.vocab_size, shards.end_of_document_id) == (None, None)
    assert "a.json is missing" in shards.notes[0]
    assert shards.fingerprint not in ("", ours)
    content = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(content[:-2] + b"\x09\x00")
    assert TokenShards(prefix).fingerprint != shards.fingerprint


def test_several_sequences_in_a_document_are_joined(tmp_path: Path) -> None:
    """Megatron allows it; --append-eod preprocessing doesn't write it."""
    prefix = write(tmp_path / "a", [[1, 2], [3], [4, 5, 6]])
    (tmp_path / "a.json").unlink()
    raw = (tmp_path / "a.idx").read_bytes()
    index = raw[:26] + (3).to_bytes(8, "little") + raw[34 : 34 + 36] + np.array([0, 2, 3], dtype="<i8").tobytes()
    (tmp_path / "a.idx").write_bytes(index)
    shards = TokenShards(prefix)
    assert shards.num_documents == 2
    assert [shards.documents(i).tolist() for i in range(2)] == [[1, 2, 3], [4, 5, 6]]
    assert verify(prefix, full=True) == []


def test_multimodal_index_is_read_with_a_note(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[1, 2], [3]])
    (tmp_path / "a.json").unlink()
    with open(tmp_path / "a.idx", "ab") as file:
        file.write(bytes(2))
    shards = TokenShards(prefix)
    assert shards.read(0, 3).tolist() == [1, 2, 3]
    assert any("multimodal" in note for note in shards.notes)


@pytest.mark.parametrize(("code", "dtype"), [(1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_all_integer_dtypes_are_read(tmp_path: Path, code: int, dtype: str) -> None:
    prefix = write(tmp_path / "a", [[1, 2, 3]])
    (tmp_path / "a.json").unlink()
    raw = bytearray((tmp_path / "a.idx").read_bytes())
    raw[17] = code
    (tmp_path / "a.idx").write_bytes(raw)
    (tmp_path / "a.bin").write_bytes(np.array([1, 2, 3], dtype=dtype).tobytes())
    assert TokenShards(prefix).read(1, 2).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 1000], "outside 0..999"),
        ([-1], "outside 0..999"),
        (torch.tensor([70000]), "outside 0..999"),  # Megatron stores 4464
        (np.array([2**16], dtype=np.uint32), "outside 0..999"),
        ([2**70], "token ids"),
        ([1.5], "integer token ids"),
        ([[1, 2]], "flat list"),
        ([], "must have 1 to"),
    ],
)
def test_ids_that_cannot_be_stored_are_refused(tmp_path: Path, tokens: object, message: str) -> None:
    writer = ShardWriter(tmp_path / "a", 1000)
    writer.add([1])
    with pytest.raises(DataError, match=r"document 1") as caught:
        writer.add(tokens)  # type: ignore[arg-type]
    assert message in str(caught.value)
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_document_without_its_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="document 1 = 3: must end with the end-of-document id 2"):
        write(tmp_path / "a", [[1, 2], [2, 3]], end_of_document_id=2)
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[1]])
    with pytest.raises(DataError, match="exists already"):
        ShardWriter(prefix, 1000)
    write(tmp_path / "a", [[7, 8]], overwrite=True)
    assert TokenShards(prefix).read(0, 2).tolist() == [7, 8]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.json"]


def test_nothing_is_visible_before_commit_or_after_a_failure(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a", 1000)
    writer.add([1])
    assert {path.suffix for path in tmp_path.iterdir()} == {".partial"}
    with pytest.raises(RuntimeError), writer:
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="no document"), ShardWriter(tmp_path / "a", 1000):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_prefix(tmp_path: Path) -> None:
    first = ShardWriter(tmp_path / "a", 1000)
    first.add([1])
    with pytest.raises(DataError, match="another process"):
        ShardWriter(tmp_path / "a", 1000)
    first.commit()
    assert TokenShards(tmp_path / "a").num_tokens == 1


def test_a_file_renamed_between_open_and_lock_is_not_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other writer commits at the worst moment: what we opened is now its finished file."""
    first = ShardWriter(tmp_path / "a", 1000)
    first.add([1, 2, 3])
    real, calls = fcntl.flock, list[int]()

    def flock(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            monkeypatch.setattr(fcntl, "flock", real)
            first.commit()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    second = ShardWriter(tmp_path / "a", 1000)
    assert calls
    assert TokenShards(tmp_path / "a").read(0, 3).tolist() == [1, 2, 3]
    second.add([4])
    with pytest.raises(DataError, match="exists already"):
        second.commit()
    assert verify(tmp_path / "a", full=True) == []
    assert list(tmp_path.glob("*.partial")) == []


def test_killed_writer_leaves_nothing_that_hinders_the_next(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom trainer.data.shards import ShardWriter\n"
        "w = ShardWriter(sys.argv[1], 1000)\nw.add([5] * 100000)\nos.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a")]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": os.getcwd()}, check=False).returncode == -9
    assert not (tmp_path / "a.bin").exists()
    prefix = write(tmp_path / "a", [[1, 2]])
    assert TokenShards(prefix).num_tokens == 2
    assert verify(prefix, full=True) == []


def test_prefix_may_hold_dots_and_must_not_be_a_directory(tmp_path: Path) -> None:
    assert TokenShards(write(tmp_path / "v1.5 data" / "a.b", [[1]])).num_tokens == 1
    (tmp_path / "d.bin").mkdir()
    with pytest.raises(DataError, match="must be a file"):
        write(tmp_path / "d", [[1]])


def test_arrays_outlive_the_object(tmp_path: Path) -> None:
    """Megatron's reader unmaps under a live view: SIGSEGV."""
    array = TokenShards(write(tmp_path / "a", [[1, 2, 3]])).read(0, 3)
    array += 1
    assert array.tolist() == [2, 3, 4]


def test_opening_is_fast_whatever_the_size(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a", 1000) as writer:
        writer.add_many(np.ones(500_000, dtype=np.int64), np.ones(500_000, dtype=np.int64))
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        TokenShards(tmp_path / "a").close()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.002, f"opening took {min(seconds) * 1000:.2f} ms"


def test_writer_memory_does_not_grow_with_documents(tmp_path: Path) -> None:
    import tracemalloc

    chunk = np.ones(50_000, dtype=np.int64)
    with ShardWriter(tmp_path / "a", 1000) as writer:
        writer.add_many(chunk, chunk)
        tracemalloc.start()
        for _ in range(20):
            writer.add_many(chunk, chunk)
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert kept < 1_000_000  # a million documents: lengths alone would be 4 MB
    assert TokenShards(tmp_path / "a").num_documents == 21 * 50_000
