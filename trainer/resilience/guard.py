"""Which steps are refused, and when refusing has to end. Pure: every rank decides alike from the same numbers."""

from __future__ import annotations

import math


def is_sound(loss: float, grad_norm: float) -> bool:
    """Return whether a step may change the weights: loss and gradient norm are finite."""
    return math.isfinite(loss) and math.isfinite(grad_norm)


def must_stop(consecutive_skips: int, max_skipped_steps: int) -> bool:
    """Return whether so many refused steps in a row mean that the run can't recover by itself."""
    return consecutive_skips > max_skipped_steps
