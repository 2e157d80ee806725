"""Token shards, how they are cut into samples, and the tokenizer that made them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.config.section import Section


class TokenizerConfig(Section):
    """The tokenizer of the run; exported with the model."""

    path: str | None = None
    """Directory or Hugging Face id that AutoTokenizer loads. Null: no text is ever produced."""
    revision: str | None = None
    """Commit, tag or branch of a Hugging Face id."""


class TrainSource(Section):
    """One set of token shards to train on."""

    path: str
    """Prefix of PREFIX.bin and PREFIX.idx."""
    weight: float = Field(default=1.0, gt=0)
    """Share of samples relative to the other sources."""


class ValidationSource(Section):
    """One set of token shards to evaluate on."""

    name: str = Field(default="validation", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of its curves in TensorBoard and of its lines in metrics.jsonl."""
    path: str
    """Prefix of PREFIX.bin and PREFIX.idx."""


class DataConfig(Section):
    """What is read, in which order it is cut: order itself is a pure function of ``run.seed``."""

    train: tuple[TrainSource, ...] = Field(min_length=1)
    """Sources to train on."""
    validation: tuple[ValidationSource, ...] = ()
    """Sources to evaluate on; may be empty."""
    sequence_length: int = Field(ge=1)
    """Target tokens per sequence."""
    packing: Literal["documents", "best_fit", "one_per_sequence"] = "documents"
    """``documents``: documents joined end to end, then cut every ``sequence_length`` tokens."""
    mask_documents: bool = False
    """Keep attention inside a document."""
    workers: int = Field(default=2, ge=0, le=64)
    """Steps read ahead by a background thread; 0 reads in the training thread. Never changes the order."""
