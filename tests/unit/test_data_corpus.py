"""Documents of a corpus: formats, one order, what is skipped and what is refused."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.core.errors import DataError
from trainer.data.corpus import Corpus

pytestmark = pytest.mark.fast


def texts(*inputs: Path, key: str = "text") -> list[str]:
    return [document.text for document in Corpus([str(path) for path in inputs], text_key=key)]


def lines(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("一\r\nπ\t🙂\n".encode())
    assert texts(tmp_path / "a.txt") == ["一\r\nπ\t🙂\n"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".ndjson"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    content = (lines({"body": "一"}, {"body": "two"}) + "\n" + lines({"body": " "}, {"body": "x\ny"})).encode()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    corpus = Corpus([str(path)], text_key="body")
    assert [document.text for document in corpus] == ["一", "two", "x\ny"]
    assert corpus.empty_documents == 1
    assert corpus.bytes_done == corpus.total_bytes == path.stat().st_size


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": list(range(600)), "text": [f"row {i}" for i in range(600)]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == [f"row {i}" for i in range(600)]


def test_zst_works_or_says_what_to_install(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    try:
        import zstandard
    except ImportError:
        path.write_bytes(b"")
        with pytest.raises(DataError, match="pip install zstandard"):
            texts(path)
        return
    path.write_bytes(
        zstandard.compress(lines({"text": "a"}).encode()) + zstandard.compress(lines({"text": "b"}).encode())
    )
    assert texts(path) == ["a", "b"]


def test_a_directory_is_read_in_one_order_and_skips_what_is_no_text(tmp_path: Path) -> None:
    for name in ("b.md", "a/z.py", "a/b/c.rst", ".git/config", "__pycache__/x.py", "c.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines({"text": name}) if path.suffix == ".jsonl" else name)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    corpus = Corpus([str(tmp_path)])
    assert [document.text for document in corpus] == ["a/b/c.rst", "a/z.py", "b.md", "c.jsonl"]
    assert sorted(Path(path).name for path in corpus.skipped_files) == ["gone", "image.png", "latin.txt"]


def test_inputs_keep_their_order(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
    assert texts(tmp_path / "b", tmp_path / "a") == ["b", "a"]


def test_links_are_followed_and_loops_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("a")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "real")
    assert texts(tmp_path / "corpus") == ["a"]
    (tmp_path / "real" / "up").symlink_to(tmp_path / "corpus")
    with pytest.raises(DataError, match="a loop"):
        Corpus([str(tmp_path / "corpus")])


def test_half_a_surrogate_pair_is_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83db"}\n{"text": "\\ud83d\\ude42"}\n')
    corpus = Corpus([str(tmp_path / "a.jsonl")])
    assert [document.text for document in corpus] == ["a\ufffdb", "🙂"]
    assert corpus.repaired_documents == 1


def test_every_missing_input_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        Corpus([str(tmp_path / "a.txt"), str(tmp_path / "b"), str(tmp_path / "empty")])
    assert [problem.rule for problem in caught.value.problems] == ["doesn't exist", "doesn't exist", "holds no files"]
    with pytest.raises(DataError, match="names nothing"):
        Corpus([])


def test_no_text_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    corpus = Corpus([str(tmp_path)])
    assert list(corpus) == []
    with pytest.raises(DataError, match="holds no text"):
        corpus.require_documents()


DAMAGED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "binary": ("a.txt", lambda p: p.write_bytes(b"a\0b"), "isn't UTF-8 text"),
    "not JSON": ("a.jsonl", lambda p: p.write_text(lines({"text": "a"}) + "{\n"), "a.jsonl:2: isn't JSON"),
    "not an object": ("a.jsonl", lambda p: p.write_text("[1]\n"), "a.jsonl:1: is a list"),
    "no key": ("a.jsonl", lambda p: p.write_text(lines({"body": 1, "id": 2})), "has no `text`; it has body, id"),
    "not text": ("a.jsonl", lambda p: p.write_text(lines({"text": None})), "`text` is NoneType"),
    "cut gzip": (
        "a.jsonl.gz",
        lambda p: p.write_bytes(gzip.compress(lines({"text": "a"}).encode())[:-9]),
        "can't be read",
    ),
    "no gzip": ("a.jsonl.gz", lambda p: p.write_bytes(b"hello"), "can't be read"),
    "no parquet": ("a.parquet", lambda p: p.write_bytes(b"PAR1 PAR1"), "Parquet"),
    "no column": ("a.parquet", lambda p: pq.write_table(pa.table({"body": ["a"]}), p), "has no `text`; it has body"),
    "fifo": ("a.txt", os.mkfifo, "regular file"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_inputs_are_placed(tmp_path: Path, name: str) -> None:
    file, damage, message = DAMAGED[name]
    damage(tmp_path / file)
    with pytest.raises(DataError) as caught:
        texts(tmp_path / file)
    assert message in str(caught.value)
