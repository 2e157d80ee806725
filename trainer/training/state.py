"""Everything that must survive a restart, beside weights, optimizer state and generators."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, cast

from trainer.core.errors import CheckpointError
from trainer.engine.base import StepResult
from trainer.evaluation.best import BestEvaluation
from trainer.resilience.guard import GuardHistory

VERSION = 1


@dataclass
class TrainState:
    """Counters of a run; the same on every rank."""

    step: int = 0
    """Steps done, applied or skipped."""
    consumed_samples: int = 0
    """Position in the data: the number of the next sample."""
    tokens: int = 0
    target_tokens: int = 0
    optimizer_steps: int = 0
    """Steps that were applied since the optimizer started; AdamW's bias correction counts these."""
    skipped_steps: int = 0
    consecutive_skips: int = 0
    corrupt_samples: int = 0
    """Samples left out of the loss because their data is corrupt."""
    evaluated_step: int = -1
    """Newest step whose evaluation was recorded."""
    best: BestEvaluation = field(default_factory=BestEvaluation)
    """The best evaluation so far, and how long ago it was."""
    guard: GuardHistory = field(default_factory=GuardHistory)
    """What steps are compared with, and the samples that rewinds left out."""

    def advance(self, samples: int, tokens: int, result: StepResult) -> None:
        """Count one step of ``samples`` and ``tokens``, all ranks together."""
        self.step += 1
        self.consumed_samples += samples
        self.tokens += tokens
        self.target_tokens += result.target_tokens
        self.corrupt_samples += result.corrupt_samples
        self.optimizer_steps += result.applied
        self.skipped_steps += not result.applied
        self.consecutive_skips = 0 if result.applied else self.consecutive_skips + 1

    def go_back(self, earlier: TrainState) -> None:
        """Become ``earlier``, the state of a checkpoint, for all who hold this one."""
        for name in fields(self):
            setattr(self, name.name, getattr(earlier, name.name))

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready fields."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainState:
        """Return the state a checkpoint holds. Raises CheckpointError for a newer version or missing fields."""
        if values.get("version") != VERSION:
            raise CheckpointError(f"training state of version {values.get('version')!r}; this trainer reads {VERSION}")
        values = {"corrupt_samples": 0} | values  # not in the first checkpoints of version 1
        given: object = values.get("best", {})  # nor this
        best = BestEvaluation.from_json(cast("dict[str, Any]", given)) if isinstance(given, dict) else None
        if best is None:
            raise CheckpointError(f"training state has no sound best evaluation: {given!r}")
        guard = GuardHistory.from_json(values.get("guard", {}))  # nor this
        if guard is None:
            raise CheckpointError("training state has no sound history of the guard")
        names = [field.name for field in fields(cls) if field.name not in ("best", "guard")]
        missing = [name for name in names if not isinstance(values.get(name), int)]
        if missing:
            raise CheckpointError(f"training state lacks {', '.join(missing)}")
        return cls(**{name: values[name] for name in names}, best=best, guard=guard)
