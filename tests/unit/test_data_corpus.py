"""Documents of a corpus: formats, one order, what is skipped and what is refused."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from trainer.core.errors import DataError
from trainer.data import corpus_rows
from trainer.data.corpus import Corpus, Position
from trainer.data.corpus_files import Kind, Patterns, Source
from trainer.data.corpus_filters import Filters, unescape
from trainer.data.corpus_rows import Columns

pytestmark = pytest.mark.fast


def texts(*inputs: Path, key: str = "text") -> list[str]:
    return list(Corpus([str(path) for path in inputs], text_key=key))


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
    assert list(corpus) == ["一", "two", "x\ny"]
    assert corpus.counts.empty == 1
    assert corpus.bytes_done == corpus.total_bytes == path.stat().st_size


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": list(range(600)), "text": [f"row {i}" for i in range(600)]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == [f"row {i}" for i in range(600)]


def zst(path: Path, *frames: bytes) -> None:
    """Write frames one after the other, as parallel compressors and `cat a.zst b.zst` do."""
    path.write_bytes(b"".join(pa.compress(frame, codec="zstd", asbytes=True) for frame in frames))


def test_zst_reads_every_frame_also_inside_a_line(tmp_path: Path) -> None:
    content = lines(*({"text": f"document {i} 你好"} for i in range(3000))).encode()
    zst(tmp_path / "a.jsonl.zst", content[:50_000], content[50_000:50_007], content[50_007:])
    corpus = Corpus([str(tmp_path / "a.jsonl.zst")])
    assert list(corpus) == [f"document {i} 你好" for i in range(3000)]
    assert corpus.bytes_done == corpus.total_bytes == (tmp_path / "a.jsonl.zst").stat().st_size
    (tmp_path / "cut.jsonl.zst").write_bytes((tmp_path / "a.jsonl.zst").read_bytes()[:-3])
    with pytest.raises(DataError, match=r"cut\.jsonl\.zst: can't be read: Truncated"):
        texts(tmp_path / "cut.jsonl.zst")


def test_compressed_text_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a\r\nb"))
    zst(tmp_path / "b.md.zst", b"c\n", b"d")
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(bytes(10)))
    assert texts(tmp_path) == ["a\r\nb", "c\nd"]


def arrow(path: Path, table: pa.Table, stream: bool) -> None:
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=300)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_arrow(tmp_path: Path, stream: bool, kind: pa.DataType) -> None:
    rows = [f"row {i} 你" for i in range(1000)]
    arrow(tmp_path / "a.arrow", pa.table({"id": range(1000), "text": pa.array(rows, kind)}), stream)
    corpus = Corpus([str(tmp_path / "a.arrow")])
    assert list(corpus) == rows
    assert corpus.bytes_done == corpus.total_bytes


def test_directories_that_datasets_saved(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(50)], "n": list(range(50))})
    data.save_to_disk(tmp_path / "one", num_shards=3)
    data.select([7, 3, 5]).save_to_disk(tmp_path / "chosen")
    assert texts(tmp_path / "one") == data["text"]
    assert texts(tmp_path / "chosen") == ["row 7", "row 3", "row 5"]
    assert texts(tmp_path) == ["row 7", "row 3", "row 5", *data["text"]]  # found below a directory
    splits = datasets.DatasetDict({"train": data, "test": data.select([1])})
    splits.save_to_disk(tmp_path / "splits")
    assert texts(tmp_path / "splits") == data["text"]
    assert list(Corpus([str(tmp_path / "splits")], split="test")) == ["row 1"]
    with pytest.raises(DataError, match="has no split 'valid'; it has train, test"):
        Corpus([str(tmp_path / "splits")], split="valid")
    next((tmp_path / "one").glob("*00001-of*.arrow")).unlink()
    with pytest.raises(DataError, match="part of a saved data set and doesn't exist"):
        texts(tmp_path / "one")


def test_rows_that_datasets_streams(tmp_path: Path) -> None:
    """What an id of the Hub becomes, with a loader that needs no Hub."""
    import datasets

    (tmp_path / "a.jsonl").write_text(lines(*({"text": f"row {i}", "n": i} for i in range(600))))
    dataset = datasets.load_dataset("json", data_files=str(tmp_path / "a.jsonl"), split="train", streaming=True)
    source = Source(Kind.dataset, "owner/name")
    for skip in (0, 300, 600):
        reader = corpus_rows._Hub(source, Columns("text"), "train")
        assert list(reader.stream(dataset, skip)) == [f"row {i}" for i in range(skip, 600)]
    reader = corpus_rows._Hub(source, Columns("text", ("n",)), "train")
    assert list(reader.stream(dataset, 598)) == [{"text": "row 598", "n": 598}, {"text": "row 599", "n": 599}]
    with pytest.raises(DataError, match="owner/name: has no `body`; it has text, n"):
        list(corpus_rows._Hub(source, Columns("body"), "train").stream(dataset, 0))


ROWS = [
    {"text": "a", "lang": "en", "stars": 1, "ok": True, "meta": {"license": "mit"}},
    {"text": "bb", "lang": "de", "stars": 20, "ok": False, "meta": {"license": "gpl"}},
    {"text": "ccc", "lang": "en", "stars": 3.5, "ok": None, "meta": {}},
    {"text": "dddd", "stars": "40"},
]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (["lang=en"], ["a", "ccc"]),
        (["lang!=en"], ["bb"]),
        (["stars>=3.5"], ["bb", "ccc", "dddd"]),
        (["stars<=3"], ["a"]),
        (["stars=20"], ["bb"]),
        (["lang=en", "stars>=2"], ["ccc"]),
        (["ok=true"], ["a"]),
        (["ok!=null"], ["a", "bb"]),
        (["meta.license=mit"], ["a"]),
        (["lang>=5"], []),
    ],
)
def test_where_chooses_rows_and_counts_the_others(tmp_path: Path, where: list[str], expected: list[str]) -> None:
    (tmp_path / "a.jsonl").write_text(lines(*ROWS))
    (tmp_path / "b.txt").write_text("text files have no keys")
    corpus = Corpus([str(tmp_path / "a.jsonl")], filters=Filters.parse(where, None, None))
    assert list(corpus) == expected
    assert corpus.counts.where == 4 - len(expected)
    assert list(Corpus([str(tmp_path)], filters=Filters.parse(where, None, None)))[-1] == "text files have no keys"


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_where_on_tables(tmp_path: Path, suffix: str) -> None:
    rows = {"text": [f"row {i}" for i in range(600)], "n": list(range(600)), "s": [{"k": i % 2} for i in range(600)]}
    path = tmp_path / f"a.{suffix}"
    pq.write_table(pa.table(rows), path) if suffix == "parquet" else arrow(path, pa.table(rows), stream=True)

    def chosen(*where: str) -> list[str]:
        return list(Corpus([str(path)], filters=Filters.parse(where, None, None)))

    assert chosen("n>=590", "s.k=0") == [f"row {i}" for i in range(590, 600, 2)]
    assert chosen("missing=1") == []


@pytest.mark.parametrize(
    ("where", "message"),
    [("lang", "isn't a condition"), ("n>=x", "compare with a number"), ("=x", "isn't a condition")],
)
def test_conditions_that_cannot_be_read(where: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Filters.parse([where], None, None)
    with pytest.raises(DataError) as caught:
        Filters.parse([where, "also wrong"], 0, -1)
    assert len(caught.value.problems) == 5


def test_lengths_are_limited_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(*({"text": "你" * n} for n in range(1, 7))))
    corpus = Corpus([str(tmp_path / "a.jsonl")], filters=Filters.parse([], 3, 4))
    assert [len(text) for text in corpus] == [3, 4]
    assert (corpus.counts.too_short, corpus.counts.too_long) == (2, 2)


def test_include_and_exclude_choose_files_of_directories(tmp_path: Path) -> None:
    for name in ("a.py", "b.md", "sub/c.py", "sub/tests/d.py", "tests/e.py", "sub/test_f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def found(include: tuple[str, ...], exclude: tuple[str, ...]) -> list[str]:
        return list(Corpus([str(tmp_path)], patterns=Patterns(include, exclude)))

    assert found(("*.py",), ()) == ["a.py", "sub/c.py", "sub/test_f.py", "sub/tests/d.py", "tests/e.py"]
    assert found(("*.py",), ("test*",)) == ["a.py", "sub/c.py"]
    assert found((), ("sub/*", "*.md")) == ["a.py", "tests/e.py"]
    assert found(("sub/*.py",), ("sub/tests/*",)) == ["sub/c.py", "sub/test_f.py"]
    corpus = Corpus([str(tmp_path)], patterns=Patterns(("*.md",), ()))
    assert (list(corpus), corpus.counts.excluded_files) == (["b.md"], 5)
    with pytest.raises(DataError, match="no files that --include and --exclude take"):
        found(("*.c",), ())


def test_a_separator_cuts_text_files(tmp_path: Path) -> None:
    (tmp_path / "fortunes").write_text("one\nline\n%\n two\n%\n\n%\n100 %\n%\n")
    corpus = Corpus([str(tmp_path / "fortunes")], separator=unescape(r"\n%\n"))
    assert list(corpus) == ["one\nline", " two", "100 %"]
    assert corpus.counts.empty == 1
    assert unescape(r"\x41\u4f60\t\\n你") == "A你\t\\n你"
    with pytest.raises(DataError, match="unknown escape"):
        unescape(r"\q")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.txt", {"filters": Filters.parse(["a=b"], None, None)}, "no input has rows"),
        ("a.jsonl", {"separator": "\n"}, "no input is one"),
        ("a.txt", {"separator": ""}, "must not be empty"),
        ("a.txt", {"patterns": Patterns(("*.py",), ())}, "no input is one"),
    ],
)
def test_options_without_effect_are_refused(tmp_path: Path, name: str, options: dict[str, Any], message: str) -> None:
    (tmp_path / name).write_text(lines({"text": "a"}))
    with pytest.raises(DataError, match=message):
        Corpus([str(tmp_path / name)], **options)


def test_it_goes_on_from_any_position(tmp_path: Path) -> None:
    """Every format, every place: a second corpus that starts there gives the rest and the same counts."""
    rows = [{"text": f"row {i}" if i % 7 else " ", "n": i % 3} for i in range(40)]
    table = pa.Table.from_pylist(rows)
    (tmp_path / "a.jsonl").write_text(lines(*rows[:10]) + "\n" + lines(*rows[10:]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(*rows).encode()))
    zst(tmp_path / "c.jsonl.zst", lines(*rows).encode())
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=9)
    arrow(tmp_path / "e.arrow", table, stream=True)
    arrow(tmp_path / "f.arrow", table, stream=False)
    (tmp_path / "g.txt").write_text("one|two||three|")
    (tmp_path / "h.bin").write_bytes(bytes(4))

    def corpus() -> Corpus:
        return Corpus([str(tmp_path)], filters=Filters.parse(["n<=1"], 5, None), separator="|")

    whole, positions, found = corpus(), list[Position](), list[str]()
    for text in whole:
        found.append(text)
        positions.append(whole.position())
    assert len(found) > 6 * 20
    positions.append(whole.position())
    for number, position in enumerate(positions, 1):
        again = corpus()
        again.start_at(Position.from_dict(json.loads(json.dumps(position.to_dict()))))
        assert list(again) == found[number:], f"after document {number}"
        assert again.counts == whole.counts
        assert again.bytes_done == whole.bytes_done


def test_a_directory_is_read_in_one_order_and_skips_what_is_no_text(tmp_path: Path) -> None:
    for name in ("b.md", "a/z.py", "a/b/c.rst", ".git/config", "__pycache__/x.py", "c.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines({"text": name}) if path.suffix == ".jsonl" else name)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    corpus = Corpus([str(tmp_path)])
    assert list(corpus) == ["a/b/c.rst", "a/z.py", "b.md", "c.jsonl"]
    assert corpus.counts.skipped_files == 3
    assert sorted(Path(path).name for path in corpus.counts.skipped_examples) == ["gone", "image.png", "latin.txt"]


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
    assert list(corpus) == ["a\ufffdb", "🙂"]
    assert corpus.counts.repaired == 1


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


def cut_arrow(path: Path) -> None:
    """Leave out the end and the last batch: what is left is a valid stream, only shorter."""
    table, schema = pa.table({"text": ["a"] * 10}), pa.schema([("text", pa.string())])
    with open(path, "wb") as file:
        writer = pa.ipc.new_stream(file, schema)
        writer.write_table(table)
        file.flush()
        size = path.stat().st_size
        writer.close()
    os.truncate(path, size)


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
    "no arrow": ("a.arrow", lambda p: p.write_bytes(b"hello, this is no arrow"), "no Arrow file"),
    "cut arrow": ("a.arrow", cut_arrow, "cut off"),
    "cut arrow file": (
        "a.arrow",
        lambda p: (arrow(p, pa.table({"text": ["a"] * 900}), stream=False), os.truncate(p, 2000)),
        "Arrow file",
    ),
    "null": ("a.parquet", lambda p: pq.write_table(pa.table({"text": ["a", None]}), p), "row 1: `text` is NoneType"),
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
