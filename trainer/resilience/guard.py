"""Which steps are refused, and what follows. Pure: every rank decides alike from the same numbers.

A step is compared with the newest ones that were applied, by median and median absolute deviation (MAD): a few
outliers among them change neither, and on a slope the MAD grows with it, so that a smooth curve never is a spike.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from statistics import median
from typing import Any, Literal, cast

from trainer.config.guard import GuardConfig

Kind = Literal["sound", "not finite", "loss spike", "gradient spike"]
Action = Literal["apply", "skip", "rewind", "stop"]

_MAD_TO_DEVIATION = 1.4826
"""Of a normal distribution."""
_SMALLEST_NORM = 1e-30
"""Stands for a gradient norm of 0, which has no logarithm."""
_MOST_VALUES = 1 << 20


@dataclass(frozen=True)
class Rewind:
    """Samples that the run left out when it went back to a checkpoint."""

    at_step: int
    """The step that was bad."""
    to_step: int
    """The checkpoint that was loaded: step ``to_step`` + 1 goes on behind the samples left out."""
    first_sample: int
    num_samples: int


@dataclass
class GuardHistory:
    """What the guard knows of the steps before; saved with the run, so that a restart judges alike."""

    losses: list[float] = field(default_factory=list[float])
    """Of the newest steps that were applied, nats/token."""
    grad_norms: list[float] = field(default_factory=list[float])
    bad_since: int | None = None
    """First of the bad steps in a row that the newest one is the last of; None: it was sound."""
    spikes: int = 0
    """Steps with a spike so far, also those that a rewind took back."""
    rewinds: list[Rewind] = field(default_factory=list[Rewind])
    """Those that led to where the run is now."""
    rewound_at: list[int] = field(default_factory=list[int])
    """The bad step of every rewind there was: what bounds them."""

    def note(self, verdict: Verdict, settings: GuardConfig, step: int, loss: float, grad_norm: float) -> None:
        """Remember a step that was judged."""
        bad = verdict.kind != "sound"
        self.bad_since = (self.bad_since or step) if bad else None
        self.spikes += verdict.kind in ("loss spike", "gradient spike")
        if verdict.action == "apply":
            self.losses = [*self.losses, loss][-settings.window_steps :]
            self.grad_norms = [*self.grad_norms, grad_norm][-settings.window_steps :]

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready fields."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: object) -> GuardHistory | None:
        """Return what ``to_json`` made; None if it is not sound. Without fields: nothing is known yet."""
        if not isinstance(values, dict):
            return None
        given = cast("dict[str, object]", values)
        losses, norms = _finite(given.get("losses", [])), _finite(given.get("grad_norms", []))
        rewound = _counts(given.get("rewound_at", []))
        bad_since, spikes, listed = given.get("bad_since"), given.get("spikes", 0), given.get("rewinds", [])
        if losses is None or norms is None or len(losses) != len(norms) or rewound is None:
            return None
        if not (bad_since is None or _is_count(bad_since)) or not _is_count(spikes) or not isinstance(listed, list):
            return None
        rewinds: list[Rewind] = []
        for item in cast("list[object]", listed):
            entry = cast("dict[str, object]", item) if isinstance(item, dict) else {}
            counts = _counts([entry.get(name.name) for name in fields(Rewind)])
            if counts is None:
                return None
            rewinds.append(Rewind(*counts))
        return cls(losses, norms, cast("int | None", bad_since), cast("int", spikes), rewinds, rewound)


@dataclass(frozen=True)
class Band:
    """Where a number is usual."""

    median: float
    limit: float
    """Above it, it is a spike."""


@dataclass(frozen=True)
class Verdict:
    """What a step is, and what follows."""

    kind: Kind
    action: Action
    loss: Band | None = None
    """None: too few steps are known."""
    grad_norm: Band | None = None
    exhausted: bool = False
    """Whether it is ``stop`` because there were too many rewinds."""


SOUND = Verdict("sound", "apply")


def judge(history: GuardHistory, settings: GuardConfig, step: int, loss: float, grad_norm: float) -> Verdict:
    """Return what is to be done about ``step``, counted from 1, before its update; all but ``apply`` refuse it."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return _verdict(history, settings, step, "not finite", settings.on_nan, None, None)
    if step <= settings.warmup_steps or len(history.losses) < settings.window_steps // 2:
        return SOUND
    losses, norms = _loss_band(history, settings), _norm_band(history, settings)
    if loss <= losses.limit and grad_norm <= norms.limit:
        return Verdict("sound", "apply", losses, norms)
    kind = "loss spike" if loss > losses.limit else "gradient spike"
    action: Action = "apply" if settings.on_spike == "ignore" else settings.on_spike
    in_row = step - (history.bad_since or step) + 1
    if action in ("rewind", "stop") and in_row < settings.patience_steps:
        action = "apply"
    return _verdict(history, settings, step, kind, action, losses, norms)


def must_stop(consecutive_skips: int, max_skipped_steps: int) -> bool:
    """Return whether so many refused steps in a row mean that the run can't recover by itself."""
    return consecutive_skips > max_skipped_steps


def samples_left_out(rewinds: list[Rewind], step: int) -> int:
    """Return how many samples before those of ``step``, counted from 1, were left out."""
    return sum(rewind.num_samples for rewind in rewinds if rewind.to_step < step)


def _verdict(
    history: GuardHistory, settings: GuardConfig, step: int, kind: Kind, action: Action,
    loss: Band | None, grad_norm: Band | None,
) -> Verdict:  # fmt: skip
    near = [at for at in history.rewound_at if abs(step - at) < settings.rewind_period_steps]
    exhausted = action == "rewind" and len(near) >= settings.max_rewinds
    return Verdict(kind, "stop" if exhausted else action, loss, grad_norm, exhausted)


def _loss_band(history: GuardHistory, settings: GuardConfig) -> Band:
    middle, deviation = _robust(history.losses)
    return Band(middle, middle + max(settings.deviations * deviation, settings.minimum_loss_rise * abs(middle)))


def _norm_band(history: GuardHistory, settings: GuardConfig) -> Band:
    """Of the logarithm: gradient norms are skewed, and many times the median is usual in small batches."""
    middle, deviation = _robust([math.log(max(norm, _SMALLEST_NORM)) for norm in history.grad_norms])
    above = max(settings.deviations * deviation, math.log(settings.minimum_norm_ratio))
    return Band(math.exp(middle), math.exp(min(middle + above, 700.0)))


def _robust(values: list[float]) -> tuple[float, float]:
    """Return median and standard deviation, the latter from the MAD."""
    middle = median(values)
    return middle, _MAD_TO_DEVIATION * median(abs(value - middle) for value in values)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _counts(values: object) -> list[int] | None:
    listed = cast("list[object]", values) if isinstance(values, list) else [None]
    return cast("list[int]", listed) if all(_is_count(value) for value in listed) else None


def _finite(values: object) -> list[float] | None:
    listed = cast("list[object]", values) if isinstance(values, list) else [None]
    if len(listed) > _MOST_VALUES or not all(type(value) is float and math.isfinite(value) for value in listed):
        return None
    return cast("list[float]", listed)
