"""When a rank counts as hanging."""

from __future__ import annotations

from pydantic import Field

from trainer.config.section import Section


class WatchdogConfig(Section):
    """A process beside each rank that ends the job when the rank is dead, stopped or hangs, and says why."""

    enabled: bool = True
    """Watch over the ranks."""
    grace_seconds: float = Field(default=60.0, gt=0)
    """Beyond the time that a step is expected to take, after which a rank counts as hanging."""
    start_seconds: float = Field(default=1800.0, gt=0)
    """That a part of the start, the first step, the first evaluation and the first save may take: nothing is known
    yet. The grace is added."""
    slow_seconds: float = Field(default=300.0, gt=0)
    """That a later evaluation or save may take at least, whatever the ones before took: file systems have bad days."""
    report_seconds: float = Field(default=3.0, ge=0)
    """How long a failed rank is kept so that all others can write down what they were doing."""
    straggler_steps: int = Field(default=50, ge=1)
    """Steps between two comparisons of the ranks' speed."""
    straggler_factor: float = Field(default=1.3, gt=1)
    """A rank is named as slow when its own work takes this many times the median's, three comparisons in a row."""
