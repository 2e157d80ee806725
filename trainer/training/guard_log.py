"""RUN/guard.jsonl: one line for each step that the guard found bad, with the documents it read."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.core import phases
from trainer.core.errors import TrainerError
from trainer.data.ledger import Ledger
from trainer.engine.base import StepResult
from trainer.resilience.guard import Rewind, Verdict
from trainer.telemetry.sinks.append import AppendFile

logger = logging.getLogger(__name__)

_MOST_DOCUMENTS = 64
"""In a line of the file: a step may read thousands. `trainer data which` lists all of them."""
_SHOWN_DOCUMENTS = 3


class GuardLog:
    """Appends to the file, which no restart and no rewind cuts back. Never raises: training goes on."""

    def __init__(self, run_directory: Path, ledger: Ledger) -> None:
        """``ledger`` shares the loader's opened sources: to open them again may take longer than a step may."""
        self._path = run_directory / "guard.jsonl"
        self._ledger = ledger

    def note(
        self, step: int, action: str, verdict: Verdict, result: StepResult, samples: tuple[int, int],
        rewind: Rewind | None,
    ) -> str:  # fmt: skip
        """Write the line of a step that read ``samples`` (first, count). Return its first documents, in words."""
        documents = self._documents(*samples)
        shown = [f"{entry['shard']} {entry['document']}" for entry in documents[:_SHOWN_DOCUMENTS]]
        loss, norm = verdict.loss, verdict.grad_norm
        line = {
            "step": step,
            "kind": verdict.kind,
            "action": action,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "loss_median": loss.median if loss else None,
            "loss_limit": loss.limit if loss else None,
            "grad_norm_median": norm.median if norm else None,
            "grad_norm_limit": norm.limit if norm else None,
            "first_sample": samples[0],
            "num_samples": samples[1],
            "documents": documents[:_MOST_DOCUMENTS],
            "more_documents": len(documents) > _MOST_DOCUMENTS,
            "rewind": asdict(rewind) if rewind else None,
            "time_unix": time.time(),
        }
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        try:
            file = AppendFile(self._path)
            try:
                file.append(f"{json.dumps(finite, allow_nan=False, ensure_ascii=False)}\n".encode())
            finally:
                file.close()
        except OSError as error:
            logger.warning("%s lacks step %d: %s", self._path, step, error)
        more = " and others" if len(documents) > len(shown) else ""
        return f"; documents {', '.join(shown)}{more}" if shown else ""

    def _documents(self, first_sample: int, num_samples: int) -> list[dict[str, Any]]:
        """Return the first documents of a step, one more than are written; none where they can't be found."""
        found: list[dict[str, Any]] = []
        try:
            for entry in self._ledger.entries(first_sample, num_samples):
                phases.board.advance()  # each may need the index of a shard that was not read yet
                found += [
                    {"sample": entry.sample, "source": entry.source, "shard": piece.shard, "document": piece.document}
                    for piece in entry.pieces
                ]
                if len(found) > _MOST_DOCUMENTS:
                    break
            return found[: _MOST_DOCUMENTS + 1]
        except (TrainerError, OSError, ValueError) as error:
            logger.warning("documents of samples from %d on: %s", first_sample, error)
            return []
