"""Train a tokenizer into a directory that AutoTokenizer loads, and load any tokenizer for encoding corpora.

Directories are written without torch: ``tokenizer.json`` holds everything, ``tokenizer_config.json`` names the roles
of special tokens. ``PreTrainedTokenizerFast`` is the class name that transformers 4 and 5 both load unchanged.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from trainer.core.errors import DataError, Problem
from trainer.data.corpus import Corpus
from trainer.data.encoder import tokenizer_hash

__all__ = ["END_OF_TEXT", "KINDS", "tokenizer_hash", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
KINDS = ("bpe", "sentencepiece")
# SentencePiece holds its sentences in memory: more than this are sampled (70 GB per 10M sentences were reported).
_SENTENCEPIECE_SENTENCES = 2_000_000
_SENTENCEPIECE_SENTENCE_BYTES = 1 << 14


def train_tokenizer(
    inputs: Sequence[str],
    output_dir: str | os.PathLike[str],
    vocab_size: int,
    kind: Literal["bpe", "sentencepiece"] = "bpe",
    *,
    text_key: str = "text",
    split: str = "train",
    overwrite: bool = False,
) -> int:
    """Train on the documents of ``inputs``, write ``output_dir`` and return the number of ids.

    Both kinds are lossless for any UTF-8 text (``sentencepiece`` alone reads U+2581 as a space), deterministic, and
    know one control token, ``<|endoftext|>``: end of document, beginning and padding. A small corpus can give fewer
    ids than asked for. Raises DataError if the inputs, the size or the output can't be used.
    """
    directory = Path(output_dir)
    _check_arguments(directory, vocab_size, kind, overwrite)
    corpus = Corpus(inputs, text_key=text_key, split=split)
    if kind == "bpe":
        files, num_ids = _train_bpe(corpus, vocab_size)
    else:
        files, num_ids = _train_sentencepiece(corpus, vocab_size)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            temporary = directory / f".{name}.partial"
            temporary.write_bytes(content)
            temporary.replace(directory / name)
    except OSError as error:
        raise DataError(Problem("output", str(directory), f"can't be written: {error.strerror}")) from error
    return num_ids


def _check_arguments(directory: Path, vocab_size: int, kind: str, overwrite: bool) -> None:
    problems: list[Problem] = []
    if kind not in KINDS:
        problems.append(Problem("kind", kind, f"must be one of {', '.join(KINDS)}"))
    minimum = 258 if kind == "sentencepiece" else 257
    if vocab_size < minimum:
        problems.append(
            Problem("vocab-size", vocab_size, f"must be at least {minimum}: 256 bytes and the special tokens")
        )
    if vocab_size > 2**31 - 1:
        problems.append(Problem("vocab-size", vocab_size, "must fit into 31 bits"))
    if directory.exists() and not directory.is_dir():
        problems.append(Problem("output", str(directory), "must be a directory"))
    elif (directory / "tokenizer.json").exists() and not overwrite:
        fix = "choose another output directory, or pass --overwrite"
        problems.append(Problem("output", str(directory), "holds a tokenizer already", fix))
    if problems:
        raise DataError(problems, title="tokenizer")


def _train_bpe(corpus: Corpus, vocab_size: int) -> tuple[dict[str, bytes], int]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(corpus), trainer)
    corpus.require_documents()
    return _files(tokenizer, unknown=None), tokenizer.get_vocab_size(with_added_tokens=True)


def _train_sentencepiece(corpus: Corpus, vocab_size: int) -> tuple[dict[str, bytes], int]:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(corpus),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            input_sentence_size=_SENTENCEPIECE_SENTENCES,
            shuffle_input_sentence=True,
            max_sentence_length=2 * _SENTENCEPIECE_SENTENCE_BYTES,
            unk_id=0,
            unk_piece=UNKNOWN,
            eos_id=1,
            eos_piece=END_OF_TEXT,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,  # stored in the file: one number on every machine
            minloglevel=2,
        )
    except RuntimeError as error:
        corpus.require_documents()
        text = str(error).strip().splitlines()[-1] if str(error).strip() else "unknown reason"
        fix = "use more text or another vocabulary size"
        raise DataError(
            Problem("vocab-size", vocab_size, f"SentencePiece refused: {text}", fix), title="tokenizer"
        ) from None
    corpus.require_documents()
    tokenizer = _from_sentencepiece(model.getvalue())
    files = _files(tokenizer, unknown=UNKNOWN)
    return {**files, "tokenizer.model": model.getvalue()}, tokenizer.get_vocab_size(with_added_tokens=True)


def _sentences(corpus: Corpus) -> Iterator[str]:
    """Yield lines, the long ones in pieces: SentencePiece drops what is longer than its limit."""
    for document in corpus:
        for line in document.splitlines():
            limit = _SENTENCEPIECE_SENTENCE_BYTES // 4  # a character has at most 4 bytes
            for start in range(0, len(line), limit):
                yield line[start : start + limit]


def _from_sentencepiece(model: bytes) -> Any:
    """Build the same tokenizer in the ``tokenizers`` library from a SentencePiece BPE model."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    for i, piece in enumerate(pieces):  # pieces are in the order of their merges
        if processor.is_byte(i) or processor.is_control(i) or processor.is_unknown(i) or len(piece) < 2:
            continue
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += sorted(
            (split for split in splits if split[0] in vocabulary and split[1] in vocabulary),
            key=lambda split: (vocabulary[split[0]], vocabulary[split[1]]),
        )
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (UNKNOWN, END_OF_TEXT)]
    )
    return tokenizer


def _files(tokenizer: Any, unknown: str | None) -> dict[str, bytes]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
    }
    if unknown:
        config["unk_token"] = unknown
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }
