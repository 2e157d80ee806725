"""Tokenizers given as one file: a tokenizer.json, or a SentencePiece model with SentencePiece's own ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece

from trainer.core.errors import DataError
from trainer.data.encoder import Encoder
from trainer.data.shards import TokenShards
from trainer.data.tokenize import tokenize
from trainer.data.tokenizer import tokenizer_hash, train_tokenizer

pytestmark = pytest.mark.fast

TEXTS = [f"def f{i}():\n\treturn '你好 🙂' * {i}  # <|endoftext|> naïve ﬁ\n" * (1 + i % 4) for i in range(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files")
    (path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    train_tokenizer([str(path / "c.jsonl")], path / "bpe", 400)
    train_tokenizer([str(path / "c.jsonl")], path / "spm", 400, "sentencepiece")
    # A unigram model with SentencePiece's defaults, which no conversion reproduces by itself: NFKC, a dummy prefix.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXTS for line in text.splitlines()),
        model_prefix=str(path / "unigram"),
        vocab_size=120,
        hard_vocab_limit=False,
        byte_fallback=False,
        minloglevel=2,
    )
    return path


def documents(prefix: Path) -> list[list[int]]:
    shards = TokenShards(prefix)
    return [shards.documents(i).tolist() for i in range(shards.num_documents)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_model_gives_the_ids_of_sentencepiece(folder: Path, tmp_path: Path, workers: int) -> None:
    model = str(folder / "unigram.model")
    (written,) = tokenize([str(folder / "c.jsonl")], model, str(tmp_path / "t"), workers)
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    assert documents(tmp_path / "t") == [[*processor.encode(text), processor.eos_id()] for text in TEXTS]
    assert written.report["unknown_fraction"] >= 0
    assert json.loads((tmp_path / "t.json").read_text())["tokenizer"]["hash"] == tokenizer_hash(model)


def test_a_trained_model_and_its_directory_agree(folder: Path, tmp_path: Path) -> None:
    for name, tokenizer in (("file", folder / "spm" / "tokenizer.model"), ("directory", folder / "spm")):
        tokenize([str(folder / "c.jsonl")], str(tokenizer), str(tmp_path / name), 1)
    assert (tmp_path / "file.bin").read_bytes() == (tmp_path / "directory.bin").read_bytes()


def test_a_tokenizer_json_is_its_directory(folder: Path, tmp_path: Path) -> None:
    for name, tokenizer in (("file", folder / "bpe" / "tokenizer.json"), ("directory", folder / "bpe")):
        tokenize([str(folder / "c.jsonl")], str(tokenizer), str(tmp_path / name), 2)
    assert (tmp_path / "file.bin").read_bytes() == (tmp_path / "directory.bin").read_bytes()
    assert tokenizer_hash(folder / "bpe" / "tokenizer.json") == tokenizer_hash(folder / "bpe")


def test_a_tokenizer_json_alone_needs_its_end_of_document(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "bpe" / "tokenizer.json", tmp_path / "t.json")
    with pytest.raises(DataError, match="--end-of-document"):
        tokenize([str(folder / "c.jsonl")], str(tmp_path / "t.json"), str(tmp_path / "out"), 1)
    arguments = ([str(folder / "c.jsonl")], str(tmp_path / "t.json"), str(tmp_path / "out"), 1)
    tokenize(*arguments, end_of_document="<|endoftext|>")
    assert Encoder.load(str(tmp_path / "t.json")).eos_id is None


@pytest.mark.parametrize(("name", "content"), [("t.model", b"no model"), ("t.model", b""), ("t.json", b'{"a": 1}')])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"isn't a (SentencePiece model|tokenizer)"):
        Encoder.load(str(tmp_path / name))


def test_special_tokens_are_not_read_from_text_by_a_model(folder: Path) -> None:
    with pytest.raises(DataError, match="parse-special-tokens"):
        Encoder.load(str(folder / "unigram.model"), None, True)
