"""What is recorded: names, units and TensorBoard tags, in one table. Torch-free, so ``trainer status`` can read it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Field:
    """One recorded number: its key in metrics.jsonl, its unit, its TensorBoard tag (None: not drawn)."""

    name: str
    unit: str
    tag: str | None
    meaning: str


STEP_FIELDS: tuple[Field, ...] = (
    Field("step", "steps", None, "optimizer step, counted from 1"),
    Field("loss", "nats/token", "train/loss", "mean over the target tokens of the global batch"),
    Field("grad_norm", "1", "optimizer/gradient_norm", "global, before clipping"),
    Field("learning_rate", "1", "optimizer/learning_rate", "used for this step"),
    Field("tokens", "tokens", "progress/tokens", "read so far, all ranks"),
    Field("samples", "sequences", "progress/samples", "read so far, all ranks"),
    Field("global_batch_size", "sequences", "progress/global_batch_size", "of this step; grows under `batch.warmup`"),
    Field("target_tokens", "tokens", "progress/target_tokens", "that counted in the loss so far, all ranks"),
    Field("step_seconds", "s", "time/step_seconds", "wall time of this step"),
    Field("tokens_per_second", "tokens/s", "throughput/tokens_per_second", "all ranks together"),
    Field(
        "model_flops_utilization", "1", "throughput/model_flops_utilization", "share of the peak; null: peak unknown"
    ),
    Field("data_wait_seconds", "s", "time/data_wait_seconds", "waiting for the batch"),
    Field("forward_backward_seconds", "s", "time/forward_backward_seconds", "forward and backward passes"),
    Field("optimizer_seconds", "s", "time/optimizer_seconds", "gradient reduction tail, clipping and update"),
    Field("skipped", "steps", "optimizer/skipped_steps", "steps refused so far (NaN, Inf, spikes)"),
    Field("spikes", "steps", "guard/spikes", "with a spike so far, also those that a rewind took back"),
    Field("rewinds", "rewinds", "guard/rewinds", "to a checkpoint so far"),
    Field("memory_bytes", "B", "memory/peak_bytes", "peak on this device, or resident set on CPU"),
    Field("corrupt_samples", "sequences", "data/corrupt_samples", "left out so far because their data is corrupt"),
    Field("batch_hash", "", None, "digest of the tokens of the global batch; `trainer data which` computes it too"),
    Field(
        "slowest_rank_seconds",
        "s",
        "stragglers/slowest_seconds",
        "own work a step of the slowest rank, when last compared",
    ),
    Field("median_rank_seconds", "s", "stragglers/median_seconds", "the same of the median rank"),
    Field("slowest_rank", "", "stragglers/slowest_rank", "which rank that was; null: not compared yet"),
    Field("time_unix", "s", None, "when the step ended"),
)

SOURCE_FIELDS: tuple[Field, ...] = (
    Field("loss", "nats/token", "sources/{name}/loss", "mean over this step's target tokens of the source; null: none"),
    Field("fraction", "1", "sources/{name}/fraction", "share of all samples read so far"),
)
"""Of each source, below ``sources`` in metrics.jsonl, where there are several."""

EVALUATION_FIELDS: tuple[Field, ...] = (
    Field("step", "steps", None, "optimizer steps done; 0: before training"),
    Field("kind", "", None, "always 'evaluation'; lines of training steps have no kind"),
    Field("name", "", None, "name of the validation source"),
    Field("validation_loss", "nats/token", "validation/{name}/loss", "mean over the target tokens"),
    Field("perplexity", "1", "validation/{name}/perplexity", "exp(validation_loss)"),
    Field("target_tokens", "tokens", None, "that were evaluated"),
    Field("seconds", "s", "validation/{name}/seconds", "wall time of the evaluation"),
    Field("best_validation_loss", "nats/token", "validation/best_loss", "lowest so far; null: another line says it"),
    Field("best_step", "steps", "validation/best_step", "where it was lowest; null: another line says it"),
    Field("time_unix", "s", None, "when the evaluation ended"),
)

CHECKPOINT_FIELDS: tuple[Field, ...] = (
    Field("step", "steps", None, "optimizer steps done"),
    Field("blocked_seconds", "s", "checkpoint/blocked_seconds", "that training stood still for it"),
    Field("seconds", "s", "checkpoint/seconds", "until it was durable"),
    Field("num_bytes", "B", "checkpoint/bytes", "that all ranks wrote"),
    Field("time_unix", "s", None, "when training learned of it"),
)
"""Of checkpoints; drawn, but not in metrics.jsonl."""

GOODPUT_FIELDS: tuple[Field, ...] = (
    Field("step", "steps", None, "optimizer steps done"),
    Field("fraction", "1", "goodput/fraction", "time in steps that count, over allocated time"),
    Field("restarts", "1", "goodput/restarts", "starts of the run but the first"),
    Field("lost_steps", "steps", "goodput/lost_steps", "done, and lost by a restart or a rewind"),
    Field("redone_seconds", "s", "goodput/redone_seconds", "in steps that were lost"),
    Field("startup_seconds", "s", "goodput/startup_seconds", "from allocations to first steps, less restoring"),
    Field("restore_seconds", "s", "goodput/restore_seconds", "verifying and loading checkpoints"),
    Field("save_seconds", "s", "goodput/save_seconds", "that training stood still for saves"),
    Field("evaluation_seconds", "s", "goodput/evaluation_seconds", "evaluating"),
    Field("other_seconds", "s", "goodput/other_seconds", "the rest of the allocated time"),
    Field("time_unix", "s", None, "when it was computed"),
)
"""Of the whole run, all its starts; drawn at every checkpoint, but not in metrics.jsonl."""


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """One source of ``data.train`` in one step. Units are in :data:`SOURCE_FIELDS`."""

    name: str
    loss: float | None
    fraction: float


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step. Units are in :data:`STEP_FIELDS`; tokens, samples, target_tokens, skipped are cumulative."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    samples: int
    global_batch_size: int
    target_tokens: int
    step_seconds: float
    tokens_per_second: float
    model_flops_utilization: float | None
    data_wait_seconds: float
    forward_backward_seconds: float
    optimizer_seconds: float
    skipped: int
    memory_bytes: int
    corrupt_samples: int
    batch_hash: str
    time_unix: float
    spikes: int = 0
    rewinds: int = 0
    slowest_rank_seconds: float | None = None
    median_rank_seconds: float | None = None
    slowest_rank: int | None = None
    sources: tuple[SourceRecord, ...] = ()
    """One a source of ``data.train``; empty where there is only one."""

    def to_json_line(self) -> str:
        """Return one line of strict JSON, without the newline; NaN and Inf become null."""
        values = _json_values(self, STEP_FIELDS)
        if self.sources:
            values["sources"] = {source.name: _json_values(source, SOURCE_FIELDS) for source in self.sources}
        return _json_line(values)

    def scalars(self) -> Iterator[tuple[str, float]]:
        """Yield (TensorBoard tag, value) of every number that is drawn and known."""
        yield from _scalars(self, STEP_FIELDS)
        for source in self.sources:
            yield from _scalars(source, SOURCE_FIELDS, source.name)


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """One evaluation of one validation source. Units are in :data:`EVALUATION_FIELDS`."""

    step: int
    name: str
    validation_loss: float
    perplexity: float
    target_tokens: int
    seconds: float
    time_unix: float
    best_validation_loss: float | None = None
    best_step: int | None = None
    """On the last record of an evaluation alone: what is compared may be a mean over the sources."""
    kind: Literal["evaluation"] = "evaluation"

    def to_json_line(self) -> str:
        """Return one line of strict JSON, without the newline; NaN and Inf become null."""
        return _json_line(_json_values(self, EVALUATION_FIELDS))

    def scalars(self) -> Iterator[tuple[str, float]]:
        """Yield (TensorBoard tag, value) of every number that is drawn and known."""
        return _scalars(self, EVALUATION_FIELDS, self.name)


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """One committed checkpoint. Units are in :data:`CHECKPOINT_FIELDS`."""

    step: int
    blocked_seconds: float
    seconds: float
    num_bytes: int
    time_unix: float

    def scalars(self) -> Iterator[tuple[str, float]]:
        """Yield (TensorBoard tag, value) of every number that is drawn."""
        return _scalars(self, CHECKPOINT_FIELDS)


@dataclass(frozen=True, kw_only=True)
class GoodputRecord:
    """Where the run's time went so far, all its starts. Units are in :data:`GOODPUT_FIELDS`."""

    step: int
    fraction: float
    restarts: int
    lost_steps: int
    redone_seconds: float
    startup_seconds: float
    restore_seconds: float
    save_seconds: float
    evaluation_seconds: float
    other_seconds: float
    time_unix: float

    def scalars(self) -> Iterator[tuple[str, float]]:
        """Yield (TensorBoard tag, value) of every number that is drawn."""
        return _scalars(self, GOODPUT_FIELDS)


_Record = StepRecord | EvaluationRecord | CheckpointRecord | GoodputRecord | SourceRecord


def perplexity(loss: float) -> float:
    """Return exp(loss), and infinity where a float can't hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _json_values(record: _Record, fields: tuple[Field, ...]) -> dict[str, object]:
    return {field.name: _json_value(getattr(record, field.name)) for field in fields}


def _json_line(values: dict[str, object]) -> str:
    return json.dumps(values, allow_nan=False, ensure_ascii=False)


def _json_value(value: object) -> object:
    # Python would write NaN and Infinity, which strict parsers (jq, JavaScript, Go) refuse.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _scalars(record: _Record, fields: tuple[Field, ...], name: str = "") -> Iterator[tuple[str, float]]:
    for field in fields:
        value: float | None = getattr(record, field.name) if field.tag else None
        if field.tag and value is not None:
            yield field.tag.format(name=name), float(value)
