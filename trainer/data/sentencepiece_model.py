"""A SentencePiece ``.model`` file as it is, with the ids that SentencePiece itself gives.

Conversions to other libraries rebuild its normaliser and may differ from it; Megatron and NeMo read the file like this.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.core.errors import DataError, Problem


class SentencePieceModel:
    """The part of a transformers tokenizer that encoding a corpus needs. Raises DataError for any other file."""

    def __init__(self, path: str) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(Path(path).read_bytes())
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            fix = "give a directory, a Hugging Face id, a tokenizer.json or a SentencePiece model"
            raise DataError(
                Problem(path, None, f"isn't a SentencePiece model: {reason}", fix), title="tokenizer"
            ) from None

    @property
    def eos_token(self) -> str | None:
        """The piece that ends a text, None if the model has none."""
        return self._piece(self._processor.eos_id())

    @property
    def unk_token(self) -> str | None:
        """The piece for unknown text."""
        return self._piece(self._processor.unk_id())

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each piece."""
        return {self._processor.id_to_piece(i): i for i in range(self._processor.get_piece_size())}

    def encode(self, text: str, **_: object) -> list[int]:
        """Return the ids of a text. Control symbols are never read from text."""
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int], **_: object) -> str:
        """Return the text of ids."""
        return self._processor.decode(list(ids))

    def _piece(self, number: int) -> str | None:
        return self._processor.id_to_piece(number) if number >= 0 else None
