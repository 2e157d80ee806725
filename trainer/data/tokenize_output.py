"""The two sides of a tokenized corpus: a writer and a report each, and the tokens that belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.core.errors import DataError, Problem
from trainer.data.encoder import Encoder
from trainer.data.shard_set_writer import SetState, SetWriter, remove_partials
from trainer.data.token_report import TokenReport
from trainer.data.tokenize_workers import Encoded

# Errors that leave nothing wrong with the inputs: what was written so far is kept for the next start.
_KEEPING = (OSError, RuntimeError)


@dataclass(frozen=True)
class Target:
    """Where one side goes, and how."""

    prefix: str
    shard_bytes: int | None
    overwrite: bool


class Side:
    """Writes one side of the split and counts it."""

    def __init__(
        self, target: Target, encoder: Encoder, tokenizer_hash: str, eos_id: int, state: dict[str, Any] | None
    ) -> None:
        """Open the output, or take it over in ``state``. Raises DataError, CannotContinueError, and for a damaged
        state KeyError, TypeError or ValueError."""
        self.prefix = target.prefix
        self.report = TokenReport(encoder.spec.path, encoder.vocab_size)
        if state is not None:
            self.report.restore(state["report"])
        self.writer = SetWriter(
            target.prefix,
            encoder.vocab_size,
            shard_bytes=target.shard_bytes,
            overwrite=target.overwrite,
            end_of_document_id=eos_id,
            tokenizer_name=encoder.name,
            tokenizer_hash=tokenizer_hash,
            resumable=True,
            continue_from=SetState.from_dict(state["writer"]) if state is not None else None,
        )

    def state(self) -> dict[str, Any]:
        """Make everything so far durable, and return what another process needs to go on from it."""
        return {"writer": self.writer.sync().to_dict(), "report": self.report.state()}

    def close(self, keep: bool) -> None:
        """Give up: remove what was written, or ``keep`` it for the next start."""
        self.writer.abort(keep)
        if not keep:
            remove_partials(self.prefix)


def add(sides: Sequence[Side], encoded: Encoded) -> None:
    """Write each document of a chunk to its side. Raises DataError if the tokenizer loses the text."""
    parts = [(encoded.tokens, encoded.lengths, encoded.text_bytes, encoded.unknown)]
    if len(sides) > 1:
        owner = encoded.to_validation.repeat(encoded.lengths)
        parts = [
            (
                encoded.tokens[owner == side],
                encoded.lengths[chosen],
                encoded.text_bytes[chosen],
                encoded.unknown[chosen],
            )
            for side in (False, True)
            for chosen in [encoded.to_validation == side]
        ]
    for side, (tokens, lengths, text_bytes, unknown) in zip(sides, parts, strict=True):
        side.writer.add_many(tokens, lengths)
        side.report.add(tokens, int(text_bytes.sum()), int(unknown.sum()))
        side.report.add_sample(*encoded.sample)
        side.report.refuse_broken(final=False)


def check_finished(sides: Sequence[Side]) -> None:
    """Raise DataError for a side without documents or a tokenizer that doesn't fit."""
    for side in sides:
        if not side.writer.num_documents:
            fix = "change --validation-fraction, or use more documents"
            raise DataError(Problem("output", side.prefix, "no document fell to this side of the split", fix))
        side.report.refuse_broken(final=True)


def worth_keeping(error: BaseException) -> bool:
    """Return whether the same command could go on after this error: nothing was wrong with its inputs."""
    return not isinstance(error, DataError) or isinstance(error.__cause__, _KEEPING)
