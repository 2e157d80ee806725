"""When a rank counts as hanging."""

from __future__ import annotations

from pydantic import Field

from trainer.config.section import Section


class WatchdogConfig(Section):
    """A process beside each rank that ends the job when the rank is dead, stopped or hangs."""

    grace_seconds: float = Field(default=60.0, gt=0)
    """Beyond the time that a step is expected to take, after which a rank counts as hanging."""
