"""One stream of tokens and documents out of any number of shards, against arrays put together by hand."""

from __future__ import annotations

import errno
import os
import resource
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from trainer.core.errors import DataError
from trainer.data import shard_files
from trainer.data.shard_manifest import SetManifest, SetMember, member_name, write_set_manifest
from trainer.data.shard_set import CorruptBlockError, ShardSet
from trainer.data.shards import ShardWriter

pytestmark = pytest.mark.fast


def write(prefix: Path, documents: list[np.ndarray], vocab_size: int = 30000, **options: object) -> SetMember:
    with ShardWriter(prefix, vocab_size, **options) as writer:  # type: ignore[arg-type]
        for document in documents:
            writer.add(document)
        side = writer.commit()
    return SetMember(prefix.name, side.num_tokens, side.num_documents, side.dtype, side.fingerprint)


def write_set(prefix: Path, shards: list[list[np.ndarray]], **options: object) -> str:
    members = [
        write(prefix.with_name(member_name(str(prefix), i)), documents, **options) for i, documents in enumerate(shards)
    ]
    write_set_manifest(str(prefix), SetManifest(tuple(members), 30000, None, None, None, "test"))
    return str(prefix)


def random_documents(seed: int, count: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 30000, int(random.integers(1, 40))) for _ in range(count)]


@pytest.fixture(scope="module")
def documents() -> list[list[np.ndarray]]:
    return [random_documents(seed, count) for seed, count in ((0, 30), (1, 1), (2, 7), (3, 50))]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, documents: list[list[np.ndarray]]) -> ShardSet:
    return ShardSet(write_set(tmp_path_factory.mktemp("set") / "code", documents))


def flat(documents: list[list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    every = [document for shard in documents for document in shard]
    return np.concatenate(every), np.cumsum([0, *(document.size for document in every)])


@pytest.mark.parametrize("count", [1, 17, 300])
def test_spans_and_documents_equal_the_stream(source: ShardSet, documents: list[list[np.ndarray]], count: int) -> None:
    tokens, edges = flat(documents)
    assert (source.num_tokens, source.num_documents, source.num_shards) == (tokens.size, edges.size - 1, 4)
    starts = np.random.default_rng(count).integers(0, tokens.size - count + 1, 200)
    out = np.empty((200, count), dtype=np.int64)
    source.read_many(starts, count, out, 30000)
    cuts = source.document_cuts(starts, count)
    for i, start in enumerate(starts.tolist()):
        assert out[i].tolist() == tokens[start : start + count].tolist()
        inside = [d for d in range(edges.size - 1) if start < edges[d] < start + count]
        mine = cuts.rows == i
        assert cuts.documents[mine].tolist() == inside
        assert cuts.columns[mine].tolist() == [int(edges[d]) - start for d in inside]
        assert edges[cuts.first_document[i]] <= start < edges[cuts.first_document[i] + 1]
    assert (np.diff(cuts.rows) >= 0).all()


def test_documents_by_number(source: ShardSet, documents: list[list[np.ndarray]]) -> None:
    _, edges = flat(documents)
    numbers = np.random.default_rng(0).permutation(edges.size - 1)
    starts, lengths = source.document_spans(numbers)
    assert starts.tolist() == edges[numbers].tolist()
    assert lengths.tolist() == np.diff(edges)[numbers].tolist()
    assert source.document_lengths(25, 10).tolist() == np.diff(edges)[25:35].tolist()
    path, document, token = source.origin(int(edges[31 + 3]) + 0)
    assert (Path(path).name, document, token) == ("code-00002", 3, 0)


def test_directory_pattern_and_set_are_the_same_stream(tmp_path: Path, documents: list[list[np.ndarray]]) -> None:
    path = write_set(tmp_path / "data" / "code", documents)
    tokens, _ = flat(documents)
    for name in (path, str(tmp_path / "data"), str(tmp_path / "data" / "code-*")):
        found = ShardSet(name)
        assert found.read(0, tokens.size).tolist() == tokens.tolist()
        assert found.fingerprint == ShardSet(path).fingerprint
        found.close()
    assert ShardSet(path + "-00001").fingerprint != ShardSet(path).fingerprint


def test_datatrove_files(tmp_path: Path) -> None:
    documents = [[np.arange(5)], [np.arange(70000, 70009)]]
    path = tmp_path / "x.ds"
    np.concatenate(documents[0] + documents[1]).astype("<u4").tofile(path)
    np.array([5, 14], dtype="<u8").tofile(str(path) + ".index")
    Path(str(path) + ".metadata").write_text("gpt2|4\n14\n14 tokens\n")
    found = ShardSet(str(path))
    assert found.read(0, 14).tolist() == [0, 1, 2, 3, 4, *range(70000, 70009)]
    assert found.document_lengths(0, 2).tolist() == [5, 9]
    assert "gpt2" in found.notes[0]
    with open(path, "ab") as file:
        file.write(b"\0\0")
    with pytest.raises(DataError, match=r"x\.ds = '58 bytes': has the wrong size: its index ends at token 14"):
        ShardSet(str(path))


def test_empty_documents_of_foreign_shards_are_passed_over(tmp_path: Path) -> None:
    lengths, pointers, first = [3, 0, 0, 4, 0], [0, 6, 6, 6, 14], [0, 1, 2, 3, 4, 5]
    (tmp_path / "a.bin").write_bytes(np.arange(7, dtype="<u2").tobytes())
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 5, 6)
    body = np.array(lengths, "<i4").tobytes() + np.array(pointers, "<i8").tobytes() + np.array(first, "<i8").tobytes()
    (tmp_path / "a.idx").write_bytes(header + body)
    found = ShardSet(str(tmp_path / "a"))
    cuts = found.document_cuts(np.array([0, 2, 3]), 4)
    assert cuts.first_document.tolist() == [0, 0, 3]
    assert (cuts.rows.tolist(), cuts.columns.tolist(), cuts.documents.tolist()) == ([0, 1], [3, 1], [3, 3])
    assert found.document_lengths(0, 5).tolist() == lengths


def test_five_thousand_shards_open_at_once_with_few_descriptors(tmp_path: Path) -> None:
    """Sparse files: their blocks are never looked at, only their sizes."""
    members = []
    for i in range(5000):
        name = member_name("big", i)
        with open(tmp_path / f"{name}.bin", "wb") as file:
            file.truncate(2 * 1000)
        with open(tmp_path / f"{name}.idx", "wb") as file:
            file.truncate(34 + 20 * 10 + 8)
        members.append(SetMember(name, 1000, 10, "uint16", f"{i:032x}"))
    path = write_set_manifest(str(tmp_path / "big"), SetManifest(tuple(members), 30000, None, None, None, "test"))
    began = time.perf_counter()
    found = ShardSet(str(path)[:-5])
    seconds = time.perf_counter() - began
    assert seconds < 3, "a bound against the quadratic only; docs/benchmarks.md has the figure"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 140, hard))
    try:
        out = np.empty((5000, 8), dtype=np.int64)
        found.read_many(np.arange(5000) * 1000, 8, out, None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    found.close()


def test_transient_errors_are_retried(source: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failing file system is a fake: nothing here can make a real one fail on demand."""
    real, failures = os.preadv, [errno.EIO, errno.ESTALE]

    def flaky(*arguments: object) -> int:
        if failures:
            raise OSError(failures.pop(), "stumbled")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", flaky)
    monkeypatch.setattr(shard_files, "_PAUSES_SECONDS", (0.0, 0.0, 0.0))
    assert source.read(0, 10).size == 10
    failures += [errno.EIO] * 10
    with pytest.raises(DataError, match=r"code-00000\.bin = 'byte 0': can't be read: .*\(4 tries\)"):
        source.read(0, 10)


def test_a_file_that_shrinks_under_a_reader_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a", [np.arange(1000)])
    found = ShardSet(str(tmp_path / "a"))
    assert found.read(0, 10).tolist() == list(range(10))
    os.truncate(tmp_path / "a.bin", 100)
    with pytest.raises(DataError, match=r"a\.bin = '100 bytes': has become shorter: expected at least 2000 bytes"):
        found.read(900, 100)


def test_a_flipped_byte_is_found_and_kept_out(tmp_path: Path) -> None:
    path = write_set(tmp_path / "s", [[np.arange(500)], [np.arange(500)]], block_bytes=256)
    found = ShardSet(path)
    assert all(not found.check_blocks(rank, 3, full=True) for rank in range(3))
    with open(path + "-00001.bin", "r+b") as file:
        file.seek(300)
        file.write(b"\xff")
    failed = [entry for rank in range(3) for entry in found.check_blocks(rank, 3, full=True)]
    assert [entry[:2] for entry in failed] == [(1, 1)]
    assert "s-00001.bin bytes 256..512 (block 1) has checksum" in failed[0][2]
    found.mark_corrupt([entry[:2] for entry in failed])
    assert found.read(500, 128).tolist() == list(range(128))
    with pytest.raises(CorruptBlockError):
        found.read(500, 129)


def test_a_sample_of_blocks_covers_both_ends(tmp_path: Path) -> None:
    write(tmp_path / "a", [np.arange(20000)], block_bytes=256)
    found = ShardSet(str(tmp_path / "a"))
    with open(tmp_path / "a.bin", "r+b") as file:
        file.write(b"\xff\xff")
        file.seek(-2, os.SEEK_END)
        file.write(b"\xff\xff")
    assert [entry[1] for entry in found.check_blocks(0, 1, full=False)] == [0, 156]


@pytest.mark.parametrize("limit", [None, 100])
def test_an_id_outside_the_vocabulary_is_placed(tmp_path: Path, limit: int | None) -> None:
    (tmp_path / "a.bin").write_bytes(np.array([1, 2, -7 if limit is None else 100, 3], dtype="<i4").tobytes())
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, 1, 2)
    (tmp_path / "a.idx").write_bytes(header + struct.pack("<iqqq", 4, 0, 0, 1))
    with pytest.raises(DataError, match=r"a\.bin at token 2 \(byte 8\) = (-7|100): token id outside 0"):
        ShardSet(str(tmp_path / "a")).read_many(np.array([1]), 3, np.empty((1, 3), dtype=np.int64), limit)


def test_what_is_wrong_with_a_source(tmp_path: Path) -> None:
    documents = [[np.arange(50)], [np.arange(60)]]
    path = write_set(tmp_path / "s", documents)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no token shards"):
        ShardSet(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="holds no token shards"):
        ShardSet(str(tmp_path / "none-*"))
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "again").symlink_to(tmp_path / "loop")
    with pytest.raises(DataError, match="a loop"):
        ShardSet(str(tmp_path / "loop"))
    links = tmp_path / "links"
    links.mkdir()
    for suffix in (".bin", ".idx"):
        (links / f"a{suffix}").symlink_to(f"{path}-00000{suffix}")
        (links / f"b{suffix}").symlink_to(f"{path}-00000{suffix}")
    with pytest.raises(DataError, match="names the same shard twice"):
        ShardSet(str(links))
    os.truncate(path + "-00001.bin", 118)
    with pytest.raises(DataError, match=r"s-00001\.bin = '118 bytes': has the wrong size: .* states 120 bytes"):
        ShardSet(path)
    os.remove(path + "-00000.idx")
    with pytest.raises(DataError) as caught:
        ShardSet(path)
    assert len(caught.value.problems) == 2, "every problem at once"


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ('"s-00001"', '"../s-00001"', "outside its own folder"),
        ('"s-00001"', '"/etc/passwd"', "outside its own folder"),
        ('"s-00001"', '"s-00000"', "names a shard twice"),
        ('"num_tokens": 60', '"num_tokens": -1', "wrong type"),
        ('"version": 1', '"version": 2', "unknown version"),
        ('"fingerprint": "', '"fingerprint": "0', "it was edited"),
    ],
)
def test_an_edited_set_manifest_is_refused(tmp_path: Path, old: str, new: str, rule: str) -> None:
    path = write_set(tmp_path / "s", [[np.arange(50)], [np.arange(60)]])
    manifest = Path(path + ".json")
    text = manifest.read_text()
    assert old in text
    manifest.write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=rule):
        ShardSet(path)
