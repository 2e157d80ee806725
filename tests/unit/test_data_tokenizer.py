"""Tokenizers: lossless, deterministic, loadable by AutoTokenizer, hashed by content."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from trainer.core.errors import DataError
from trainer.data.encoder import Encoder
from trainer.data.tokenizer import tokenizer_hash, train_tokenizer

pytestmark = pytest.mark.fast
KINDS = ("bpe", "sentencepiece")
CORPUS = Path(json.__file__).parent
HARD = (
    "def f(x):\r\n\treturn  x  # 你好,世界 🙂👩‍👩‍👧\u200d e\u0301 ﬁ ½\n\n\n   end ",
    "<|endoftext|> is text here, so is <unk> and <0x0A>",
    " leading and trailing ",
    "\n",
    "　全角空格",
    "\ufffd\u00a0\u2028",
)


@pytest.fixture(scope="module", params=KINDS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "tokenizer"
    assert train_tokenizer([str(CORPUS)], folder, 600, request.param) == 600
    return folder


@pytest.mark.parametrize("text", HARD)
def test_round_trip_is_exact(directory: Path, text: str) -> None:
    encoder = Encoder.load(str(directory))
    assert encoder.decode(encoder.encode_batch([text])[0]) == text


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_any_text_comes_back(directory: Path, text: str) -> None:
    encoder = Encoder.load(str(directory))
    ids = encoder.encode_batch([text])[0]
    assert encoder.decode(ids) == text
    assert all(0 <= i < encoder.vocab_size for i in ids)
    assert encoder.eos_id not in ids
    assert encoder.unk_id is None or encoder.unk_id not in ids


def test_autotokenizer_loads_it_and_agrees(directory: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    encoder = Encoder.load(str(directory))
    assert len(tokenizer) == encoder.vocab_size == 600
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == encoder.eos_id
    for text in HARD:
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert ids == encoder.encode_batch([text])[0]
        assert tokenizer.decode(ids) == text
    assert tokenizer("a<|endoftext|>")["input_ids"][-1] == encoder.eos_id
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(directory) == tokenizer_hash(tokenizer) == tokenizer_hash(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(HARD[0])["input_ids"] == tokenizer(HARD[0])["input_ids"]
    assert again.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_deterministic_and_hash_follows_content(tmp_path: Path, kind: str) -> None:
    for name, size in (("a", 400), ("b", 400), ("c", 401)):
        train_tokenizer([str(CORPUS)], tmp_path / name, size, kind)  # type: ignore[arg-type]
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert tokenizer_hash(tmp_path / "a") == tokenizer_hash(tmp_path / "b") != tokenizer_hash(tmp_path / "c")


def test_sentencepiece_model_beside_it_gives_the_same_ids(tmp_path: Path) -> None:
    import sentencepiece

    train_tokenizer([str(CORPUS)], tmp_path / "t", 600, "sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t" / "tokenizer.model"))
    encoder = Encoder.load(str(tmp_path / "t"))
    sources = [path.read_text() for path in sorted(CORPUS.glob("*.py"))]
    for text in [*sources, HARD[0]]:
        assert processor.encode(text) == encoder.encode_batch([text])[0]


def test_truncation_stored_in_the_file_is_ignored(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "t")
    tokenizer = Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(tmp_path / "t" / "tokenizer.json"))
    text = "import json " * 20
    assert Encoder.load(str(tmp_path / "t")).encode_batch([text]) == Encoder.load(str(directory)).encode_batch([text])


def test_special_tokens_in_the_text_are_parsed_only_on_request(directory: Path) -> None:
    plain, parsing = Encoder.load(str(directory)), Encoder.load(str(directory), parse_special_tokens=True)
    assert plain.eos_id not in plain.encode_batch(["a<|endoftext|>b"])[0]
    assert plain.eos_id in parsing.encode_batch(["a<|endoftext|>b"])[0]
    assert plain.hash == parsing.hash


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_beside_a_model_config_the_ids_are_those_of_autotokenizer(
    directory: Path, tmp_path: Path, model_type: str
) -> None:
    """transformers lets qwen2 overrule the class: it brings its own pre-tokenizer."""
    shutil.copytree(directory, tmp_path / "t")
    (tmp_path / "t" / "config.json").write_text(json.dumps({"model_type": model_type}))
    expected = AutoTokenizer.from_pretrained(tmp_path / "t")("x = 12345  # ok")["input_ids"]
    encoder = Encoder.load(str(tmp_path / "t"))
    assert encoder.encode_batch(["x = 12345  # ok"])[0] == expected
    assert Encoder.build(encoder.spec).encode_batch(["x = 12345  # ok"])[0] == expected


def test_a_tokenizer_without_a_class_name_is_loaded_by_transformers(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "</s>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "unk_token": "<unk>"}')
    encoder = Encoder.load(str(tmp_path))
    assert encoder.encode_batch(["a b c"]) == [[1, 2, 0]]
    assert (encoder.eos_id, encoder.unk_id, encoder.vocab_size) == (3, 0, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_training_loads_neither_torch_nor_transformers(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.txt").write_text("hello world, " * 50)
    script = (
        "import sys\nfrom trainer.data.tokenizer import train_tokenizer, tokenizer_hash\n"
        f"train_tokenizer([{str(tmp_path / 'a.txt')!r}], {str(tmp_path / 't')!r}, 300, {kind!r})\n"
        f"tokenizer_hash({str(tmp_path / 't')!r})\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_small_corpus_gives_fewer_ids(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("aab aab")
    assert train_tokenizer([str(tmp_path / "a.txt")], tmp_path / "t", 5000) < 300


@pytest.mark.parametrize(
    ("size", "kind", "message"),
    [
        (256, "bpe", "at least 257"),
        (257, "sentencepiece", "at least 258"),
        (2**31, "bpe", "31 bits"),
        (300, "x", "kind"),
    ],
)
def test_arguments_that_cannot_be_used(tmp_path: Path, size: int, kind: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_tokenizer([str(CORPUS)], tmp_path / "t", size, kind)  # type: ignore[arg-type]
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_empty_text_is_refused_and_nothing_written(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(DataError, match="holds no text"):
        train_tokenizer([str(tmp_path / "a.txt")], tmp_path / "t", 300, kind)  # type: ignore[arg-type]
    assert not (tmp_path / "t").exists()


def test_existing_tokenizer_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    train_tokenizer([str(CORPUS)], tmp_path / "t", 300)
    with pytest.raises(DataError, match="holds a tokenizer already"):
        train_tokenizer([str(CORPUS)], tmp_path / "t", 300)
    train_tokenizer([str(CORPUS)], tmp_path / "t", 301, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="must be a directory"):
        train_tokenizer([str(CORPUS)], tmp_path / "file", 300)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path, directory: Path) -> None:
    with pytest.raises(DataError, match="empty directory"):
        Encoder.load(str(tmp_path))
    shutil.copytree(directory, tmp_path / "t")
    (tmp_path / "t" / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json: isn't a tokenizer that loads"):
        Encoder.load(str(tmp_path / "t"))
