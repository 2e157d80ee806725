"""Damaged token shards: every fault is refused at opening or found by verify, and named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trainer.core.errors import DataError
from trainer.data.shards import ShardWriter, TokenShards, verify

pytestmark = pytest.mark.fast

# 3 documents of 4, 3 and 5 uint16: lengths at 34, offsets at 46, document index at 70, 102 bytes.
LENGTHS, POINTERS, DOCUMENTS = 34, 46, 70


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "a", 1000, block_bytes=8) as writer:
        for document in ([1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11, 12]):
            writer.add(document)
    return tmp_path / "a"


def patch(path: Path, offset: int, data: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(data)] = data
    path.write_bytes(raw)


def idx(prefix: Path) -> Path:
    return prefix.with_name("a.idx")


def int64(value: int) -> bytes:
    return value.to_bytes(8, "little", signed=True)


def truncate(path: Path, size: int) -> None:
    os.truncate(path, size)


REFUSED_AT_OPENING: dict[str, tuple[Callable[[Path], object], str]] = {
    "bin cut off": (lambda p: truncate(p.with_name("a.bin"), 22), "a.bin = '22 bytes': has the wrong size"),
    "bin cut inside a token": (lambda p: truncate(p.with_name("a.bin"), 23), "a.bin = '23 bytes'"),
    "bin empty": (lambda p: truncate(p.with_name("a.bin"), 0), "a.bin = '0 bytes'"),
    "bin too long": (lambda p: p.with_name("a.bin").write_bytes(bytes(26)), "a.bin = '26 bytes'"),
    "bin missing": (lambda p: p.with_name("a.bin").unlink(), "a.bin: doesn't exist"),
    "bin a directory": (lambda p: (p.with_name("a.bin").unlink(), p.with_name("a.bin").mkdir()), "must be a file"),
    "idx missing": (lambda p: idx(p).unlink(), "a.idx: doesn't exist"),
    "idx empty": (lambda p: truncate(idx(p), 0), "wrong magic"),
    "idx cut in the header": (lambda p: truncate(idx(p), 20), "cut off"),
    "idx cut off": (lambda p: truncate(idx(p), 101), "a.idx = '101 bytes': has the wrong size"),
    "idx too long": (lambda p: idx(p).write_bytes(idx(p).read_bytes() + b"x"), "a.idx = '103 bytes'"),
    "magic": (lambda p: patch(idx(p), 0, b"X"), "wrong magic"),
    "legacy": (lambda p: patch(idx(p), 0, b"TNTIDX\0\0"), "legacy Megatron"),
    "version": (lambda p: patch(idx(p), 9, int64(2)), "unknown version"),
    "big-endian version": (lambda p: patch(idx(p), 9, (1).to_bytes(8, "big")), "big-endian"),
    "float64": (lambda p: patch(idx(p), 17, b"\x06"), "floating-point"),
    "float32": (lambda p: patch(idx(p), 17, b"\x07"), "floating-point"),
    "unknown dtype": (lambda p: patch(idx(p), 17, b"\x09"), "unknown token dtype"),
    "other dtype": (lambda p: patch(idx(p), 17, b"\x04"), "a.bin = '24 bytes': has the wrong size"),
    "huge S": (lambda p: patch(idx(p), 18, b"\xff" * 8), "has the wrong size"),
    "huge D": (lambda p: patch(idx(p), 26, b"\xff" * 8), "has the wrong size"),
    "last document": (lambda p: patch(idx(p), DOCUMENTS + 24, int64(4)), "document index must run from 0 to 3"),
    "first document": (lambda p: patch(idx(p), DOCUMENTS, int64(1)), "document index must run from 0 to 3"),
    "first offset": (lambda p: patch(idx(p), POINTERS, int64(2)), "past the beginning"),
    "last offset past the end": (lambda p: patch(idx(p), POINTERS + 16, int64(2**40)), "the index ends at byte"),
    "last offset negative": (lambda p: patch(idx(p), POINTERS + 16, int64(-2)), "has the wrong size"),
    "last length": (lambda p: patch(idx(p), LENGTHS + 8, b"\x06"), "the index ends at byte 26"),
    "side-car not JSON": (lambda p: p.with_name("a.json").write_text("{"), "a.json: can't be read"),
    "side-car a list": (lambda p: p.with_name("a.json").write_text("[]"), "isn't a JSON object"),
    "side-car foreign": (lambda p: p.with_name("a.json").write_text("{}"), "isn't the side-car"),
}


@pytest.mark.parametrize("name", REFUSED_AT_OPENING)
def test_refused_at_opening(prefix: Path, name: str) -> None:
    damage, message = REFUSED_AT_OPENING[name]
    damage(prefix)
    with pytest.raises(DataError) as caught:
        TokenShards(prefix)
    assert message in str(caught.value)
    assert [problem.rule for problem in verify(prefix)] == [problem.rule for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_tokens", 13, "fingerprint"),
        ("version", 2, "unknown version"),
        ("vocab_size", "many", "wrong type"),
        ("blocks", {}, "wrong type"),
        ("fingerprint", "00", "fingerprint"),
    ],
)
def test_edited_side_car_is_refused(prefix: Path, key: str, value: object, message: str) -> None:
    path = prefix.with_name("a.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(DataError, match=message):
        TokenShards(prefix)


def test_side_car_of_other_shards_is_refused(prefix: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "b", 1000) as writer:
        writer.add([1, 2, 3])
    prefix.with_name("a.json").write_bytes((tmp_path / "b.json").read_bytes())
    with pytest.raises(DataError, match="describes other files"):
        TokenShards(prefix)


def test_empty_index_is_refused(prefix: Path) -> None:
    idx(prefix).write_bytes(idx(prefix).read_bytes()[:18] + bytes(8) + int64(1) + int64(0))
    with pytest.raises(DataError, match="is empty"):
        TokenShards(prefix)


@pytest.mark.parametrize("position", [0, 7, 8, 15, 23])
def test_one_flipped_bit_in_bin_is_placed(prefix: Path, position: int) -> None:
    raw = (prefix.with_name("a.bin")).read_bytes()
    patch(prefix.with_name("a.bin"), position, bytes([raw[position] ^ 1]))
    TokenShards(prefix)  # not seen at opening: that is what verify is for
    start = position // 8 * 8
    assert any(f"a.bin bytes {start}..{start + 8}" in problem.key for problem in verify(prefix, full=True))


@pytest.mark.parametrize("position", range(LENGTHS, 102))
def test_one_flipped_bit_in_idx_is_found(prefix: Path, position: int) -> None:
    raw = idx(prefix).read_bytes()
    patch(idx(prefix), position, bytes([raw[position] ^ 1]))
    assert any("a.idx" in problem.key or "a.bin" in problem.key for problem in verify(prefix))


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (POINTERS + 8, int64(10), "sequence 1 must start at byte 8"),
        (POINTERS + 8, int64(-8), "sequence 1 must start at byte 8"),
        (LENGTHS + 4, b"\xff\xff\xff\xff", "sequence 1 has a negative length"),
        (LENGTHS + 4, b"\x04", "sequence 2 must start at byte 16"),
        (DOCUMENTS + 16, int64(0), "document index entry 2 is smaller"),
    ],
)
def test_structure_is_checked_without_a_side_car(prefix: Path, offset: int, data: bytes, message: str) -> None:
    prefix.with_name("a.json").unlink()
    patch(idx(prefix), offset, data)
    TokenShards(prefix)
    (problem,) = verify(prefix)
    assert message in problem.rule
    assert "a.idx at byte" in problem.key


def test_damaged_document_index_never_leaves_the_stream(prefix: Path) -> None:
    prefix.with_name("a.json").unlink()
    patch(idx(prefix), DOCUMENTS + 8, int64(2**50))
    with pytest.raises(DataError, match="document index is damaged"):
        TokenShards(prefix).documents(0)


def test_negative_ids_are_found_without_a_side_car(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a", 70000) as writer:
        writer.add([1, 2, 3])
    (tmp_path / "a.json").unlink()
    patch(tmp_path / "a.bin", 4, (-5).to_bytes(4, "little", signed=True))
    (problem,) = verify(tmp_path / "a", full=True)
    assert problem.value == -5
    assert "a.bin at token 1" in problem.key


def test_sampling_reads_ends_and_full_reads_everything(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a", 1000, block_bytes=16) as writer:
        writer.add(np.arange(1000))
    missed = 0
    for block in range(125):
        raw = (tmp_path / "a.bin").read_bytes()
        patch(tmp_path / "a.bin", block * 16, b"\xff")
        missed += not verify(tmp_path / "a")
        assert verify(tmp_path / "a", full=True)
        if block in (0, 124):
            assert verify(tmp_path / "a")
        (tmp_path / "a.bin").write_bytes(raw)
    assert 0 < missed < 125


def test_file_that_shrinks_while_open_is_an_error_not_a_crash(prefix: Path) -> None:
    shards = TokenShards(prefix)
    truncate(prefix.with_name("a.bin"), 10)
    assert shards.read(0, 5).tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(DataError, match="has become shorter"):
        shards.read(0, 12)


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, 13), (12, 1), (0, -1)])
def test_reading_outside_the_stream(prefix: Path, start: int, count: int) -> None:
    with pytest.raises(DataError, match="outside"):
        TokenShards(prefix).read(start, count)


def test_suffix_in_the_prefix_is_explained(prefix: Path) -> None:
    with pytest.raises(DataError, match="give the prefix"):
        TokenShards(f"{prefix}.bin")


def test_fifo_is_refused_instead_of_waited_for(prefix: Path) -> None:
    idx(prefix).unlink()
    os.mkfifo(idx(prefix))
    with pytest.raises(DataError, match="regular file"):
        TokenShards(prefix)
