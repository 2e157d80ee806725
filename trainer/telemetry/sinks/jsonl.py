"""RUN/metrics.jsonl: one JSON object per logged step or evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from trainer.telemetry.record import CheckpointRecord, EvaluationRecord, GoodputRecord, StepRecord
from trainer.telemetry.sinks.append import AppendFile, replace_file


class JsonlSink:
    """Append records to a file of JSON lines, first cut back to the step the run resumes from."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Open ``path``. Keep lines with step <= ``resume_step``; 0 starts from an empty file. Raises OSError."""
        self._path = path
        if path.exists():
            replace_file(path, _kept_lines(path, resume_step))
        self._file = AppendFile(path)

    def __str__(self) -> str:
        return str(self._path)

    def step(self, record: StepRecord) -> None:
        """Append one line. Raises OSError (the file then still ends with a whole line)."""
        self._file.append(f"{record.to_json_line()}\n".encode())

    def evaluation(self, record: EvaluationRecord) -> None:
        """Append one line. Raises OSError (the file then still ends with a whole line)."""
        self._file.append(f"{record.to_json_line()}\n".encode())

    def checkpoint(self, record: CheckpointRecord) -> None:
        """Ignore: the lines go up by step, and checkpoints are told of later."""

    def goodput(self, record: GoodputRecord) -> None:
        """Ignore: RUN/attempts/ has it."""

    def message(self, text: str) -> None:
        """Ignore: messages are no records."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _kept_lines(path: Path, resume_step: int) -> Iterator[bytes]:
    if resume_step <= 0:
        return  # training starts over, and so does the evaluation at step 0
    with path.open("rb") as file:
        for line in file:
            step = _step_of(line)
            if step is not None and step <= resume_step:
                yield line if line.endswith(b"\n") else line + b"\n"


def _step_of(line: bytes) -> int | None:
    """Return the step of a line, None if the line is torn or not ours."""
    try:
        value: object = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = cast("dict[str, object]", value).get("step") if isinstance(value, dict) else None
    return step if type(step) is int else None
