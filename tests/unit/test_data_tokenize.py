"""Corpus to shards: the same bytes for any number of workers, a stable split, broken tokenizers refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from trainer.core.errors import DataError
from trainer.data import tokenize as module
from trainer.data.encoder import Encoder
from trainer.data.shards import TokenShards, verify
from trainer.data.tokenize import Progress, tokenize
from trainer.data.tokenizer import tokenizer_hash, train_tokenizer

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 700 documents, 140 of them empty, and a tokenizer."""
    path = tmp_path_factory.mktemp("tokenize")
    texts = [f"def f{i}():\n\treturn '你好 🙂' * {i}  # <|endoftext|>\n" * (i % 5) for i in range(700)]
    (path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer([str(path / "c.jsonl")], path / "tokenizer", 400)
    return path


def files(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")]


def test_bytes_do_not_depend_on_the_number_of_workers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_DOCUMENTS", 16)  # 35 chunks: more than are under way at a time
    arguments = ([str(folder / "c.jsonl")], str(folder / "tokenizer"))
    for workers in (1, 2, 3):
        tokenize(
            *arguments,
            str(tmp_path / f"t{workers}"),
            workers,
            validation_fraction=0.2,
            validation_output=str(tmp_path / f"v{workers}"),
        )
    for side in "tv":
        assert files(tmp_path / f"{side}1") == files(tmp_path / f"{side}2") == files(tmp_path / f"{side}3")


def test_every_document_comes_back_and_ends_with_eos(folder: Path, tmp_path: Path) -> None:
    (written,) = tokenize([str(folder / "c.jsonl")], str(folder / "tokenizer"), str(tmp_path / "t"), 1)
    texts = [json.loads(line)["text"] for line in (folder / "c.jsonl").read_text().splitlines()]
    texts = [text for text in texts if text]
    encoder, shards = Encoder.load(str(folder / "tokenizer")), TokenShards(tmp_path / "t")
    documents = [shards.documents(i).tolist() for i in range(shards.num_documents)]
    assert [encoder.decode(document[:-1]) for document in documents] == texts
    assert {document[-1] for document in documents} == {encoder.eos_id} == {shards.end_of_document_id}
    assert all(encoder.eos_id not in document[:-1] for document in documents)
    assert verify(tmp_path / "t", full=True) == []
    assert shards.sidecar is not None
    assert shards.sidecar.tokenizer_name == "tokenizer"
    assert shards.tokenizer_hash == tokenizer_hash(folder / "tokenizer")
    assert shards.vocab_size == encoder.vocab_size
    assert (written.num_documents, written.num_tokens) == (len(texts), shards.num_tokens)
    report = shards.sidecar.report
    assert report == written.report
    size = sum(len(text.encode()) for text in texts)
    assert report["bytes"] == size
    assert report["bytes_per_token"] == round(size / shards.num_tokens, 4)
    assert report["unknown_fraction"] == 0
    assert report["unigram_entropy_bits"] > 2
    assert report["round_trip"]["checked"] == 1
    assert report["round_trip"]["failed"] == 0
    assert report["empty_documents"] == 140


def test_the_split_is_stable_when_documents_are_added(folder: Path, tmp_path: Path) -> None:
    lines = [line for line in (folder / "c.jsonl").read_text().splitlines() if json.loads(line)["text"]]

    def split(name: str, chosen: list[str]) -> tuple[set[str], set[str]]:
        (tmp_path / f"{name}.jsonl").write_text("\n".join(chosen))
        outputs = [tmp_path / f"{name}-t", tmp_path / f"{name}-v"]
        tokenize(
            [str(tmp_path / f"{name}.jsonl")],
            str(folder / "tokenizer"),
            str(outputs[0]),
            1,
            validation_fraction=0.25,
            validation_output=str(outputs[1]),
        )
        encoder = Encoder.load(str(folder / "tokenizer"))
        sides = []
        for output in outputs:
            shards = TokenShards(output)
            sides.append({encoder.decode(shards.documents(i)[:-1].tolist()) for i in range(shards.num_documents)})
        return sides[0], sides[1]

    train, validation = split("few", lines[:300])
    more_train, more_validation = split("more", list(reversed(lines)))
    assert train & validation == set()
    assert train <= more_train
    assert validation <= more_validation
    assert 0.15 < len(more_validation) / len(lines) < 0.35


def test_progress_reaches_the_end(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(module, "_CHUNK_DOCUMENTS", 256)  # three chunks
    seen: list[Progress] = []
    tokenize([str(folder / "c.jsonl")], str(folder / "tokenizer"), str(tmp_path / "t"), 1, progress=seen.append)
    assert len(seen) == 4
    assert [p.documents for p in seen] == sorted(p.documents for p in seen)
    assert seen[-1].bytes_done == seen[-1].total_bytes == (folder / "c.jsonl").stat().st_size
    assert seen[-1].tokens == TokenShards(tmp_path / "t").num_tokens
    assert seen[-1].tokens_per_second > 0
    assert seen[-1].remaining_seconds == 0


def words(path: Path, vocabulary: list[str], unknown: str | None, eos: str | None = "</s>") -> str:
    """A tokenizer that knows these words; what it doesn't know becomes ``unknown`` or is lost."""
    path.mkdir()
    ids = {word: i for i, word in enumerate([*([unknown] if unknown else []), *vocabulary, "</s>"])}
    model = models.WordLevel(ids, unk_token=unknown) if unknown else models.BPE(ids, [])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "unk_token": unknown}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return str(path)


def test_a_corpus_of_unknown_tokens_is_refused(folder: Path, tmp_path: Path) -> None:
    broken = words(tmp_path / "w", ["def"], "<unk>")
    with pytest.raises(DataError, match="of the tokens are unknown"):
        tokenize([str(folder / "c.jsonl")], broken, str(tmp_path / "t"), 1)
    assert list(tmp_path.glob("t*")) == []


def test_a_few_unknown_tokens_are_a_warning(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a " * 99 + "x")
    (written,) = tokenize([str(tmp_path / "a.txt")], words(tmp_path / "w", ["a"], "<unk>"), str(tmp_path / "t"), 1)
    assert written.report["unknown_tokens"] == 1
    assert any("unknown" in warning for warning in written.warnings)


def test_text_that_vanishes_is_refused(tmp_path: Path) -> None:
    """No unknown token and no byte fallback: `tokenizers` drops what it doesn't know without a word."""
    (tmp_path / "a.txt").write_text("a" + "你" * 50)
    with pytest.raises(DataError, match="survive encoding and decoding"):
        tokenize([str(tmp_path / "a.txt")], words(tmp_path / "w", ["a"], None), str(tmp_path / "t"), 1)


def test_lossy_but_usable_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a  b a\tb " * 20)
    (written,) = tokenize([str(tmp_path / "a.txt")], words(tmp_path / "w", ["a", "b"], "<unk>"), str(tmp_path / "t"), 1)
    assert written.report["round_trip"]["failed"] == 1
    assert any("don't come back" in warning for warning in written.warnings)


def test_a_tokenizer_without_eos_needs_the_token_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a b a b")
    tokenizer = words(tmp_path / "w", ["a", "b"], "<unk>", eos=None)
    with pytest.raises(DataError, match="has no eos token"):
        tokenize([str(tmp_path / "a.txt")], tokenizer, str(tmp_path / "t"), 1)
    with pytest.raises(DataError, match="has no token 'no'"):
        tokenize([str(tmp_path / "a.txt")], tokenizer, str(tmp_path / "t"), 1, end_of_document="no")
    tokenize([str(tmp_path / "a.txt")], tokenizer, str(tmp_path / "t"), 1, end_of_document="</s>")
    assert TokenShards(tmp_path / "t").documents(0).tolist() == [1, 2, 1, 2, 3]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_line_leaves_nothing_behind(folder: Path, tmp_path: Path, workers: int) -> None:
    (tmp_path / "a.jsonl").write_text((folder / "c.jsonl").read_text() + "{\n")
    with pytest.raises(DataError, match=r"a\.jsonl:701"):
        tokenize([str(tmp_path / "a.jsonl")], str(folder / "tokenizer"), str(tmp_path / "t"), workers)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_empty_side_of_the_split_is_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "a.txt").write_text("one document")
    with pytest.raises(DataError, match="this side of the split"):
        tokenize(
            [str(tmp_path / "a.txt")],
            str(folder / "tokenizer"),
            str(tmp_path / "t"),
            1,
            validation_fraction=0.01,
            validation_output=str(tmp_path / "v"),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers"),
        ({"validation_fraction": 1.0, "validation_output": "v"}, "below 1"),
        ({"validation_fraction": 0.1}, "belong together"),
        ({"validation_output": "v"}, "belong together"),
        ({"validation_fraction": 0.1, "validation_output": "t"}, "must differ"),
        ({"output": "."}, "names a directory"),
    ],
)
def test_arguments_that_cannot_be_used(
    folder: Path, tmp_path: Path, options: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments: dict[str, object] = {"output": "t", **options}
    with pytest.raises(DataError, match=message):
        tokenize([str(folder / "c.jsonl")], str(folder / "tokenizer"), **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
