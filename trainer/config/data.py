"""Token shards, how they are cut into samples, and the tokenizer that made them."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from trainer.config.section import Section, broken_rule


class TokenizerConfig(Section):
    """The tokenizer of the run; exported with the model."""

    path: str | None = None
    """Directory or Hugging Face id that AutoTokenizer loads. Null: no text is ever produced."""
    revision: str | None = None
    """Commit, tag or branch of a Hugging Face id."""


_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class TrainSource(Section):
    """Token shards to train on, read as one stream."""

    path: str
    """Prefix of PREFIX.bin and PREFIX.idx or of a shard set, a directory of shards, a pattern (code-*), a .ds file."""
    name: str | None = Field(default=None, pattern=_NAME)
    """Name of its curves and in ``data.stages``; null: the last part of the path."""
    weight: float | None = Field(default=None, ge=0)
    """Share of samples relative to the other sources; null: 1. 0: read in a later stage only."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over this source in the whole run, instead of a weight."""
    tokens: float | None = Field(default=None, gt=0)
    """Target tokens from this source in the whole run, instead of a weight."""

    @property
    def label(self) -> str:
        """``name``, or what stands in for it."""
        text = self.path.rstrip("/").rsplit("/", 1)[-1]
        return self.name or re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:64] or "source"

    @property
    def has_budget(self) -> bool:
        """Whether it says how much is read, not in which share."""
        return self.epochs is not None or self.tokens is not None

    @model_validator(mode="after")
    def _check(self) -> TrainSource:
        given = [name for name in ("weight", "epochs", "tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise broken_rule(f"give one of weight, epochs and tokens, not {' and '.join(given)}", "remove the others")
        return self


class MixStage(Section):
    """Weights that hold once so many tokens were read, until the next stage."""

    after_tokens: float = Field(gt=0)
    """Target tokens of the run (all sources together) after which these weights hold; rounded up to a sequence."""
    weights: dict[str, float] = Field(min_length=1)
    """Weight by name of the source. A source that isn't named isn't read in this stage."""


class ValidationSource(Section):
    """Token shards to evaluate on."""

    name: str = Field(default="validation", pattern=_NAME)
    """Name of its curves in TensorBoard and of its lines in metrics.jsonl."""
    path: str
    """As ``data.train.path``."""


class DataConfig(Section):
    """What is read, in which order it is cut: order itself is a pure function of ``run.seed``."""

    train: tuple[TrainSource, ...] = Field(min_length=1)
    """Sources to train on."""
    stages: tuple[MixStage, ...] = ()
    """Later weights of the sources, each from a number of tokens on. Stages that lie ahead may be changed any time."""
    validation: tuple[ValidationSource, ...] = ()
    """Sources to evaluate on; may be empty."""
    sequence_length: int = Field(ge=1)
    """Target tokens per sequence."""
    packing: Literal["documents", "best_fit", "one_per_sequence"] = "documents"
    """``documents``: joined end to end, then cut every ``sequence_length`` tokens. ``best_fit``: whole documents packed
    into sequences; only longer ones are cut. ``one_per_sequence``: one document each, its end cut off, padded."""
    mask_documents: bool = False
    """Keep attention inside a document: positions restart with each one. Refused for models that don't heed it."""
    boundary_loss: bool | None = None
    """Train the prediction of a document's first token from the document before; null: unless ``mask_documents``."""
    integrity: Literal["sampled", "full"] = "sampled"
    """Checksums looked at when a run starts: a few blocks of each source, or all of them (shared among the ranks)."""
    on_corrupt: Literal["stop", "skip"] = "stop"
    """A block that fails its checksum or can't be read: stop, or leave its sequences out of the loss and count them."""
    workers: int = Field(default=2, ge=0, le=64)
    """Steps read ahead by a background thread; 0 reads in the training thread. Never changes the order."""

    @property
    def trains_boundaries(self) -> bool:
        """``boundary_loss``, or what stands in for it."""
        return not self.mask_documents if self.boundary_loss is None else self.boundary_loss

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if (problem := mixture_rule(self)) is not None:
            raise problem
        return self


def mixture_rule(data: DataConfig) -> PydanticCustomError | None:
    """Return what is wrong with names, weights, budgets and stages taken together."""
    labels = [source.label for source in data.train]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        if len({source.path for source in data.train}) < len(labels):
            return None  # the same source twice: another rule says so better
        return broken_rule(f"two sources are called {twice!r}", "give each a `name` of its own", key="train")
    budgets = [source.has_budget for source in data.train]
    if any(budgets) and not all(budgets):
        rule = "some sources have a budget (epochs or tokens) and others a weight"
        return broken_rule(rule, "give every source a budget, or every source a weight", key="train")
    if any(budgets) and data.stages:
        return broken_rule("stages change weights, but the sources have budgets", "use weights", key="stages")
    if all(source.weight == 0 for source in data.train):
        return broken_rule("every weight is 0: there is nothing to read", "give one a weight", key="train")
    previous = 0.0
    for i, stage in enumerate(data.stages):
        key = f"stages.{i}"
        if stage.after_tokens <= previous:
            return broken_rule("stages must follow one another", "sort them by after_tokens", key=f"{key}.after_tokens")
        previous = stage.after_tokens
        if unknown := sorted(stage.weights.keys() - set(labels)):
            rule = f"there is no source called {unknown[0]!r}; there are {', '.join(labels)}"
            return broken_rule(rule, "correct the name, or give a source this `name`", key=f"{key}.weights")
        if any(weight < 0 for weight in stage.weights.values()) or not any(stage.weights.values()):
            return broken_rule("needs weights of 0 or above, one of them above 0", key=f"{key}.weights")
    named = {name for stage in data.stages for name, weight in stage.weights.items() if weight}
    never = [s.label for s in data.train if s.weight == 0 and s.label not in named]
    if never:
        return broken_rule(f"source {never[0]!r} has weight 0 in every stage", "remove it, or name it", key="train")
    return None
