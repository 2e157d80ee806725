"""Does a tokenizer fit its corpus? Counted while tokenizing: a corpus of <unk> costs a night when nobody looks."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.core.errors import DataError, Problem

ROUND_TRIP_CHARACTERS = 2048
"""Length of the sample of each chunk that is encoded and decoded again."""

MAX_UNKNOWN_FRACTION = 0.10
MIN_KEPT_FRACTION = 0.5
# Below these there is too little text to judge by before everything is read.
_EARLY_TOKENS = 100_000
_MIN_ENTROPY_BITS = 2.0
_ENTROPY_TOKENS = 10_000
# Byte-level text has one byte a token; any tokenizer that was trained on such text has two or more.
_MIN_BYTES_PER_TOKEN = 1.2
# A text that uses so little of a vocabulary is of another language or kind; small vocabularies are used up quickly.
_MIN_USED_FRACTION = 0.02
_USED_TOKENS = 100_000


_STATE = ("tokens", "bytes", "unknown", "checked", "failed", "characters", "kept", "example")


class TokenReport:
    """Counts of one set of token shards while it is written."""

    def __init__(self, tokenizer: str, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._counts = np.zeros(vocab_size, dtype=np.int64)
        self._tokens = self._bytes = self._unknown = 0
        self._checked = self._failed = self._characters = self._kept = 0
        self._example = ""

    def add(self, tokens: NDArray[np.integer[Any]], text_bytes: int, unknown: int) -> None:
        """Count the tokens of documents and the bytes of their text."""
        if tokens.size:
            self._counts += np.bincount(tokens, minlength=self._counts.size)
            self._tokens += tokens.size
        self._bytes += text_bytes
        self._unknown += unknown

    def add_sample(self, text: str, decoded: str) -> None:
        """Take a piece of text and what encoding and decoding made of it."""
        self._checked += 1
        self._characters += len(text)
        self._kept += min(len(text), len(decoded))
        if text != decoded:
            self._failed += 1
            self._example = self._example or _first_difference(text, decoded)

    @property
    def num_tokens(self) -> int:
        """Tokens counted so far, end-of-document ids included."""
        return self._tokens

    @property
    def unknown_fraction(self) -> float:
        """Unknown tokens among all tokens."""
        return self._unknown / max(1, self.num_tokens)

    @property
    def entropy_bits(self) -> float:
        """Entropy of the distribution of single tokens, in bits; 0 if all tokens are the same."""
        counts = self._counts[self._counts > 0]
        if counts.size < 2:
            return 0.0
        shares = counts / counts.sum()
        return float(-(shares * np.log2(shares)).sum())

    def to_dict(self) -> dict[str, Any]:
        """Return what goes into PREFIX.json."""
        return {
            "bytes": self._bytes,
            "bytes_per_token": round(self._bytes / max(1, self.num_tokens), 4),
            "unknown_tokens": self._unknown,
            "unknown_fraction": round(self.unknown_fraction, 6),
            "unigram_entropy_bits": round(self.entropy_bits, 4),
            "used_ids": int((self._counts > 0).sum()),
            "round_trip": {"checked": self._checked, "failed": self._failed, "example": self._example},
        }

    def state(self) -> dict[str, Any]:
        """Return everything counted so far as JSON values."""
        packed = base64.b85encode(zlib.compress(self._counts.astype("<i8").tobytes(), 1)).decode()
        return {"counts": packed, **{name: getattr(self, f"_{name}") for name in _STATE}}

    def restore(self, state: dict[str, Any]) -> None:
        """Take what ``state`` returned in another process. Raises KeyError or ValueError."""
        try:
            counts = np.frombuffer(zlib.decompress(base64.b85decode(state["counts"])), dtype="<i8")
        except zlib.error as error:
            raise ValueError(f"damaged counts: {error}") from None
        if counts.size != self._counts.size:
            raise ValueError("counts of another vocabulary")
        self._counts = counts.astype(np.int64)
        for name in _STATE:
            setattr(self, f"_{name}", state[name])

    def refuse_broken(self, final: bool) -> None:
        """Raise DataError if the tokenizer loses the text; before the end only once there is enough to judge by."""
        if not final and self.num_tokens < _EARLY_TOKENS:
            return
        problems: list[Problem] = []
        fix = "train a tokenizer on this corpus (`trainer data tokenizer`), or check --tokenizer"
        if self.unknown_fraction > MAX_UNKNOWN_FRACTION:
            rule = f"{self.unknown_fraction:.1%} of the tokens are unknown, at most {MAX_UNKNOWN_FRACTION:.0%} may be"
            problems.append(Problem("tokenizer", self._tokenizer, rule, fix))
        kept = self._kept / max(1, self._characters)
        if kept < MIN_KEPT_FRACTION:
            rule = f"only {kept:.1%} of the characters survive encoding and decoding"
            problems.append(Problem("tokenizer", self._tokenizer, rule, fix))
        if problems:
            raise DataError(problems, title="tokenize")

    def warnings(self) -> list[str]:
        """Return what is odd but no reason to stop."""
        warnings: list[str] = []
        if self._unknown:
            warnings.append(f"{self._unknown} tokens ({self.unknown_fraction:.2%}) are unknown to the tokenizer")
        if self._failed:
            warnings.append(
                f"{self._failed} of {self._checked} samples don't come back from encoding and decoding: {self._example}"
            )
        if self.num_tokens >= _ENTROPY_TOKENS and self.entropy_bits < _MIN_ENTROPY_BITS:
            warnings.append(
                f"the tokens are very uniform ({self.entropy_bits:.2f} bits each): is this the right corpus?"
            )
        used = int((self._counts > 0).sum())
        if self.num_tokens >= _USED_TOKENS and used < _MIN_USED_FRACTION * self._counts.size:
            warnings.append(
                f"only {used:,} of {self._counts.size:,} token ids occur: is this tokenizer made for such text?"
            )
        per_token = self._bytes / max(1, self.num_tokens)
        if self.num_tokens >= _ENTROPY_TOKENS and per_token < _MIN_BYTES_PER_TOKEN:
            warnings.append(
                f"{per_token:.2f} bytes a token: the tokenizer takes this text apart, so training sees little of it"
            )
        return warnings


def _first_difference(text: str, decoded: str) -> str:
    length = min(len(text), len(decoded))
    place = next((i for i in range(length) if text[i] != decoded[i]), length)
    window = slice(max(0, place - 10), place + 20)
    return f"{text[window]!r} became {decoded[window]!r}"
