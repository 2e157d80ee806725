"""What the run does when something goes wrong."""

from __future__ import annotations

from pydantic import Field

from trainer.config.guard import GuardConfig
from trainer.config.section import Section
from trainer.config.watchdog import WatchdogConfig


class ResilienceConfig(Section):
    """What the run does when something goes wrong."""

    max_skipped_steps: int = Field(default=10, ge=0)
    """Consecutive NaN/Inf steps after which the run stops with exit code 93."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """Ends a job of which a rank is dead, stopped or hangs."""
    guard: GuardConfig = GuardConfig()
    """What is done about NaN, Inf and spikes."""
