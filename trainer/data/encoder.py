"""Turn text into token ids exactly as AutoTokenizer would, without importing torch where that can be avoided."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.core.errors import DataError, Problem
from trainer.core.hub import hub_answers
from trainer.data.sentencepiece_model import SentencePieceModel

# Classes for which transformers uses tokenizer.json as it is. Others rebuild parts of it (LlamaTokenizer always
# brings its own pre-tokenizer), and beside a config.json the model type may overrule the class (qwen2 does): there
# only transformers itself gives the ids that training and generation will see.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


@dataclass(frozen=True)
class EncoderSpec:
    """What another process needs to build the same encoder; picklable."""

    path: str
    revision: str | None
    serialised: str | None
    """tokenizer.json as text; None for SentencePiece models and tokenizers written in Python, to be loaded again."""
    parse_special_tokens: bool


class Encoder:
    """A tokenizer reduced to what a corpus needs: no truncation, no padding, no tokens added.

    Special tokens that are spelled out in the text stay text unless ``parse_special_tokens``: a web page that quotes
    ``<|endoftext|>`` doesn't end a document.
    """

    def __init__(self, tokenizer: Any, spec: EncoderSpec, eos_token: str | None, unk_token: str | None) -> None:
        self.spec = spec
        self._tokenizer = tokenizer
        self._fast = spec.serialised is not None
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        """One more than the largest id, added tokens included."""
        self.eos_token = eos_token
        self.eos_id = vocabulary.get(eos_token) if eos_token else None
        self.unk_id = vocabulary.get(unk_token) if unk_token else None
        self.name = Path(spec.path).resolve().name if os.path.isdir(spec.path) else spec.path
        if self._fast:
            tokenizer.no_truncation()
            tokenizer.no_padding()
            tokenizer.encode_special_tokens = not spec.parse_special_tokens

    @property
    def hash(self) -> str:
        """``tokenizer_hash`` of this tokenizer."""
        return tokenizer_hash(self._tokenizer)

    @property
    def serialised_hash(self) -> str:
        """Hash of everything that decides ids, normalisers and pre-tokenizers too; differs between versions."""
        content = (self.spec.serialised or "").encode()
        if not content and os.path.isfile(self.spec.path):
            content = Path(self.spec.path).read_bytes()
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    @staticmethod
    def load(path: str, revision: str | None = None, parse_special_tokens: bool = False) -> Encoder:
        """Load a directory, a Hugging Face id, a tokenizer.json or a SentencePiece model.

        Raises DataError if there is no tokenizer in it.
        """
        directory = Path(path)
        if directory.is_file():
            return _from_file(EncoderSpec(path, revision, None, parse_special_tokens))
        config = _read_config(directory / "tokenizer_config.json")
        file = directory / "tokenizer.json"
        plain = config.get("tokenizer_class") in _PLAIN_CLASSES and "auto_map" not in config
        if plain and file.is_file() and not (directory / "config.json").exists():
            try:
                serialised = file.read_text(encoding="utf-8")
                spec = EncoderSpec(path, revision, serialised, parse_special_tokens)
                return Encoder(_from_text(serialised), spec, _token(config, "eos_token"), _token(config, "unk_token"))
            except Exception as error:  # noqa: BLE001 (tokenizers raises plain Exception for a damaged file)
                raise _refused(str(file), f"isn't a tokenizer that loads: {error}") from None
        tokenizer = _from_transformers(path, revision)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        serialised = backend.to_str() if backend is not None else None
        spec = EncoderSpec(path, revision, serialised, parse_special_tokens)
        chosen = _from_text(serialised) if serialised is not None else tokenizer
        return Encoder(chosen, spec, tokenizer.eos_token, tokenizer.unk_token)

    @staticmethod
    def build(spec: EncoderSpec) -> Encoder:
        """Build the encoder of another process again; roles of special tokens are left out."""
        if spec.serialised is not None:
            return Encoder(_from_text(spec.serialised), spec, None, None)
        if os.path.isfile(spec.path):
            return Encoder(SentencePieceModel(spec.path), spec, None, None)
        return Encoder(_from_transformers(spec.path, spec.revision), spec, None, None)

    def id_of(self, token: str) -> int | None:
        """Return the id of a token of the vocabulary, or None."""
        return self._tokenizer.get_vocab().get(token)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        if self._fast:
            encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in encoded]
        split = not self.spec.parse_special_tokens
        return [
            self._tokenizer.encode(text, add_special_tokens=False, truncation=False, split_special_tokens=split)
            for text in texts
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens included, nothing cleaned up."""
        if self._fast:
            return self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def tokenizer_hash(tokenizer: Any) -> str:
    """Return 32 hex digits for what a tokenizer's ids mean: vocabulary, merges and special tokens.

    Takes a directory, a ``tokenizers.Tokenizer`` or a transformers tokenizer; the three agree, and saving and loading
    doesn't change it (file bytes differ between library versions).
    """
    if isinstance(tokenizer, (str, os.PathLike)):
        return Encoder.load(os.fspath(tokenizer)).hash
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if isinstance(tokenizer, SentencePieceModel):
        return _hash(tokenizer.get_vocab(), [], [])
    if hasattr(backend, "to_str"):
        raw = json.loads(backend.to_str())
        added = [[token["id"], token["content"], token["special"]] for token in raw["added_tokens"]]
        return _hash(_vocabulary(raw["model"]), _merges(raw["model"]), added)
    # A tokenizer written in Python: no serialised form, but the same facts.
    special = set(tokenizer.all_special_tokens)
    added = [[i, str(token), str(token) in special] for i, token in tokenizer.added_tokens_decoder.items()]
    return _hash(dict(tokenizer.get_vocab()), [], added)


def _hash(vocabulary: dict[str, int], merges: list[list[str]], added: list[list[Any]]) -> str:
    # Added tokens may or may not be repeated in the model's vocabulary: one map makes both the same.
    everything = {**vocabulary, **{content: i for i, content, _ in added}}
    content = [sorted(everything.items(), key=lambda item: (item[1], item[0])), merges, sorted(added)]
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary
    return {piece: i for i, (piece, _) in enumerate(vocabulary)}  # Unigram: pieces with scores, in order of ids


def _merges(model: dict[str, Any]) -> list[list[str]]:
    return [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model.get("merges") or []]


def _from_file(spec: EncoderSpec) -> Encoder:
    if not spec.path.endswith(".json"):
        if spec.parse_special_tokens:
            rule = "can't be used with a SentencePiece model: it reads no control symbols from text"
            raise _refused("parse-special-tokens", rule, "leave it out, or give a directory of the tokenizer")
        model = SentencePieceModel(spec.path)
        return Encoder(model, spec, model.eos_token, model.unk_token)
    try:
        serialised = Path(spec.path).read_text(encoding="utf-8")
        tokenizer = _from_text(serialised)
    except Exception as error:  # noqa: BLE001 (tokenizers raises plain Exception for a damaged file)
        raise _refused(spec.path, f"isn't a tokenizer that loads: {error}") from None
    # The file says which tokens are special, not which one ends a document; the directory around it may.
    config = _read_config(Path(spec.path).with_name("tokenizer_config.json"))
    return Encoder(
        tokenizer, replace(spec, serialised=serialised), _token(config, "eos_token"), _token(config, "unk_token")
    )


def _from_text(serialised: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(serialised)


def _from_transformers(path: str, revision: str | None) -> Any:
    directory = Path(path)
    if directory.is_dir() and not any(directory.iterdir()):
        raise _refused(path, "is an empty directory, expected a tokenizer")
    parent_exists = len(directory.parts) > 1 and directory.parent.exists()
    if not directory.is_dir() and (directory.is_absolute() or parent_exists):
        raise _refused(path, "doesn't exist", "give the directory that `trainer data tokenizer` wrote")
    # Without an answer only the cache can have it.
    cached = not directory.is_dir() and not hub_answers(path, "model")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            path, revision=revision or "main", local_files_only=cached, trust_remote_code=False
        )
    except Exception as error:  # noqa: BLE001 (a library's many ways to say: no tokenizer here)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = "give a directory with tokenizer.json or tokenizer.model, or a Hugging Face id"
        raise _refused(path, f"isn't a tokenizer that loads: {reason}", fix) from None


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _refused(str(path), f"can't be read: {error}") from None
    return config if isinstance(config, dict) else {}


def _token(config: dict[str, Any], role: str) -> str | None:
    token = config.get(role)
    return token.get("content") if isinstance(token, dict) else token


def _refused(key: str, rule: str, fix: str = "") -> DataError:
    return DataError(Problem(key, None, rule, fix), title="tokenizer")
