"""How much of its time a run that fails now and then keeps, and how often it should save. Closed forms, pure.

Failures come at random, on average one in ``mtbf_seconds`` of the whole job while it runs. After each the job stands
for ``downtime_seconds`` (noticing, new nodes, start-up), then restores. A save stops training for ``blocked_seconds``
and is durable ``durable_seconds`` after it began, so that a failure in between goes back to the save before.
Sources: Young, A first order approximation to the optimum checkpoint interval (1974); Daly, A higher order estimate of
the optimum checkpoint interval for restart dumps (2006).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LLAMA3_FAILURES, LLAMA3_DAYS, LLAMA3_GPUS = 419, 54, 16_384
"""Unexpected interruptions while Llama 3 405B was trained (The Llama 3 Herd of Models, 2024, section 3.3.4)."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a failure and a save cost a job, in seconds."""

    mtbf_seconds: float
    """Mean time between failures of the whole job; inf: none."""
    blocked_seconds: float
    durable_seconds: float
    restore_seconds: float
    downtime_seconds: float

    def __post_init__(self) -> None:
        """Raise ValueError for what can't be a cost."""
        values = (self.blocked_seconds, self.durable_seconds, self.restore_seconds, self.downtime_seconds)
        if not self.mtbf_seconds > 0 or not all(0 <= value < math.inf for value in values):
            raise ValueError(f"times must be finite and not negative, mtbf_seconds above 0: {self}")


def mtbf_seconds(gpus: int) -> float:
    """Return the mean time between failures of a job on ``gpus`` GPUs at the rate of Llama 3's: 50,700 h a GPU."""
    return LLAMA3_DAYS * 86_400 * LLAMA3_GPUS / LLAMA3_FAILURES / gpus


def young_interval(costs: Costs) -> float:
    """Return Young's interval between saves, in seconds of training: sqrt(2 C M)."""
    return math.sqrt(2 * costs.blocked_seconds * costs.mtbf_seconds)


def daly_interval(costs: Costs) -> float:
    """Return Daly's higher-order interval between saves, in seconds of training."""
    cost, mtbf = costs.blocked_seconds, costs.mtbf_seconds
    if cost >= 2 * mtbf:
        return mtbf
    share = cost / (2 * mtbf)
    return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(share) / 3 + share / 9) - cost


def expected_goodput(interval_seconds: float, costs: Costs) -> float:
    """Return the expected share of time in steps that count, saving after every ``interval_seconds`` of training.

    A renewal argument: between two failures the job restores and then makes one save after the other durable. With
    T, C, S, R, D, M for interval, blocked, durable, restore, downtime and mtbf, and l = 1 / M,

        T l exp(-l (R + T + S)) / ((1 - exp(-l max(T + C, S))) (1 + l D))

    which for S = C is Daly's exact model of a save that training waits for, and T / (T + C) without failures.
    """
    durable_seconds = max(costs.durable_seconds, costs.blocked_seconds)
    period = max(interval_seconds + costs.blocked_seconds, durable_seconds)  # a save waits for the one before
    if math.isinf(costs.mtbf_seconds):
        return interval_seconds / period
    rate = 1 / costs.mtbf_seconds
    first = costs.restore_seconds + interval_seconds + durable_seconds
    saved = interval_seconds * math.exp(-rate * first) / -math.expm1(-rate * period)
    return saved / (costs.mtbf_seconds + costs.downtime_seconds)


def best_interval(costs: Costs, least_seconds: float = 1.0) -> float:
    """Return the interval that maximises :func:`expected_goodput`, in seconds of training, to 0.1 %.

    At least ``least_seconds``, a step. Without failures it is infinite.
    """
    if math.isinf(costs.mtbf_seconds):
        return math.inf
    low = math.log(least_seconds)
    high = max(low, math.log(4 * costs.mtbf_seconds))
    ratio = (math.sqrt(5) - 1) / 2  # golden section: the goodput has one maximum
    while high - low > 1e-3:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if expected_goodput(math.exp(left), costs) < expected_goodput(math.exp(right), costs):
            low = left
        else:
            high = right
    return math.exp((low + high) / 2)
