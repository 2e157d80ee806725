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
    deadline: bool = True
    """Inside a SLURM job: save and stop before its time limit, by the measured time of steps, evaluations and saves,
    even where no signal comes. Until a save was measured, ``launch.slurm.signal_seconds`` before it."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """Ends a job of which a rank is dead, stopped or hangs."""
    guard: GuardConfig = GuardConfig()
    """What is done about NaN, Inf and spikes."""
