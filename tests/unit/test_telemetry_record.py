"""Names, units and tags of what is recorded; strict JSON whatever the numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.telemetry.record import (
    EVALUATION_FIELDS,
    SOURCE_FIELDS,
    STEP_FIELDS,
    EvaluationRecord,
    SourceRecord,
    StepRecord,
    perplexity,
)

pytestmark = pytest.mark.fast


def step_record(step: int = 1, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "loss": 5.5,
        "grad_norm": 1.25,
        "learning_rate": 3e-4,
        "tokens": 512 * step,
        "samples": step,
        "global_batch_size": 1,
        "target_tokens": 512 * step,
        "step_seconds": 0.5,
        "tokens_per_second": 1024.0,
        "model_flops_utilization": None,
        "data_wait_seconds": 0.01,
        "forward_backward_seconds": 0.4,
        "optimizer_seconds": 0.05,
        "skipped": 0,
        "memory_bytes": 1 << 30,
        "corrupt_samples": 0,
        "batch_hash": "00c0ffee0000",
        "time_unix": 1.7e9 + step,
    }
    return StepRecord(step=step, **{**values, **changes})


def evaluation_record(step: int = 0, **changes: Any) -> EvaluationRecord:
    values: dict[str, Any] = {
        "name": "code",
        "validation_loss": 5.0,
        "perplexity": 148.4,
        "target_tokens": 4096,
        "seconds": 1.5,
        "time_unix": 1.7e9 + step,
    }
    return EvaluationRecord(step=step, **{**values, **changes})


def refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def strict(line: str) -> dict[str, Any]:
    return json.loads(line, parse_constant=refuse_constant)


def test_the_table_and_the_records_name_the_same_fields() -> None:
    assert {f.name for f in dataclasses.fields(StepRecord)} == {f.name for f in STEP_FIELDS} | {"sources"}
    assert {f.name for f in dataclasses.fields(SourceRecord)} == {f.name for f in SOURCE_FIELDS} | {"name"}
    assert {f.name for f in dataclasses.fields(EvaluationRecord)} == {f.name for f in EVALUATION_FIELDS}


def test_no_two_fields_share_a_tag() -> None:
    tags = [field.tag for field in (*STEP_FIELDS, *EVALUATION_FIELDS) if field.tag]
    assert len(tags) == len(set(tags))


def test_names_others_rely_on() -> None:
    line = strict(step_record().to_json_line())
    numbers = {"step", "loss", "grad_norm", "learning_rate", "tokens", "samples", "target_tokens", "step_seconds"}
    numbers |= {"tokens_per_second", "model_flops_utilization", "data_wait_seconds", "skipped", "time_unix"}
    numbers |= {"global_batch_size"}
    assert set(line) >= numbers
    assert "kind" not in line
    evaluation = strict(evaluation_record().to_json_line())
    assert evaluation["kind"] == "evaluation"
    assert evaluation["validation_loss"] == 5.0
    assert dict(step_record().scalars()).keys() >= {
        "train/loss",
        "optimizer/learning_rate",
        "optimizer/gradient_norm",
        "progress/tokens",
        "throughput/tokens_per_second",
        "time/step_seconds",
        "time/data_wait_seconds",
        "memory/peak_bytes",
    }
    assert dict(evaluation_record().scalars()).keys() >= {"validation/code/loss", "validation/code/perplexity"}


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_losses_keep_full_precision_and_lines_stay_strict_json(loss: float) -> None:
    text = step_record(loss=loss, grad_norm=-loss, skipped=3).to_json_line()
    line = strict(text)
    assert "\n" not in text
    assert line["skipped"] == 3
    if math.isfinite(loss):
        assert f'"loss": {loss!r},' in text
        assert line["grad_norm"] == -loss
    else:
        assert line["loss"] is None
        assert line["grad_norm"] is None


def test_unknown_utilization_is_null_in_json_and_absent_from_curves() -> None:
    tag = "throughput/model_flops_utilization"
    assert strict(step_record().to_json_line())["model_flops_utilization"] is None
    assert tag not in dict(step_record().scalars())
    assert dict(step_record(model_flops_utilization=0.41).scalars())[tag] == 0.41


def test_perplexity_of_a_diverged_loss_does_not_overflow() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_records_and_neighbours_are_torch_free() -> None:
    modules = (
        "trainer.telemetry.record, trainer.core.logs, trainer.core.units, trainer.models.flops, trainer.optim.table, "
        "trainer.optim.schedules, trainer.optim.groups, trainer.checkpoint.layout, trainer.checkpoint.retention, "
        "trainer.telemetry.sinks.jsonl, trainer.telemetry.sinks.console, trainer.telemetry.throughput"
    )
    code = f"import {modules}, sys; print([m for m in ('torch', 'deepspeed', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_sources_stand_below_the_step_and_have_their_own_curves() -> None:
    sources = (SourceRecord(name="code", loss=2.5, fraction=0.75), SourceRecord(name="prose", loss=None, fraction=0.25))
    record = step_record(3, sources=sources)
    assert strict(record.to_json_line())["sources"] == {
        "code": {"loss": 2.5, "fraction": 0.75},
        "prose": {"loss": None, "fraction": 0.25},
    }
    drawn = {tag: value for tag, value in record.scalars() if tag.startswith("sources/")}
    assert drawn == {"sources/code/loss": 2.5, "sources/code/fraction": 0.75, "sources/prose/fraction": 0.25}
    assert "sources" not in strict(step_record().to_json_line())
