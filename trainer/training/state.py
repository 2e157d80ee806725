"""Everything that must survive a restart, beside weights, optimizer state and generators."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from trainer.core.errors import CheckpointError

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
    """Steps that were applied; AdamW's bias correction counts these."""
    skipped_steps: int = 0
    consecutive_skips: int = 0
    evaluated_step: int = -1
    """Newest step whose evaluation was recorded."""

    def advance(self, samples: int, tokens: int, target_tokens: int, applied: bool) -> None:
        """Count one step."""
        self.step += 1
        self.consumed_samples += samples
        self.tokens += tokens
        self.target_tokens += target_tokens
        self.optimizer_steps += applied
        self.skipped_steps += not applied
        self.consecutive_skips = 0 if applied else self.consecutive_skips + 1

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready fields."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainState:
        """Return the state a checkpoint holds. Raises CheckpointError for a newer version or missing fields."""
        if values.get("version") != VERSION:
            raise CheckpointError(f"training state of version {values.get('version')!r}; this trainer reads {VERSION}")
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if not isinstance(values.get(name), int)]
        if missing:
            raise CheckpointError(f"training state lacks {', '.join(missing)}")
        return cls(**{name: values[name] for name in names})
