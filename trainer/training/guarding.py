"""The guard as the loop sees it: steps are judged before their update, and what follows is done after them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.config.batch_schedule import batch_size
from trainer.config.resilience import ResilienceConfig
from trainer.core.errors import DoNotRestartError
from trainer.engine.base import StepPreview, StepResult
from trainer.resilience.guard import SOUND, Verdict, judge, must_stop
from trainer.training.guard_log import GuardLog
from trainer.training.rewinding import rewind
from trainer.training.state import TrainState

if TYPE_CHECKING:
    from trainer.training.loop import Parts


class Guard:
    """Judges the steps of a run; the same on every rank. Only rank 0 has a ``log``."""

    def __init__(self, settings: ResilienceConfig, state: TrainState, log: GuardLog | None) -> None:
        self._settings = settings
        self._state = state
        self.log = log
        self.verdict = SOUND
        """Of the newest step."""

    def accept(self, preview: StepPreview) -> bool:
        """Veto a step before it changes anything: NaN, Inf, and spikes as the policy says. See engine.base.Accept."""
        step = self._state.step + 1
        history, settings = self._state.guard, self._settings.guard
        self.verdict = judge(history, settings, step, preview.loss, preview.grad_norm)
        history.note(self.verdict, settings, step, preview.loss, preview.grad_norm)
        return self.verdict.action == "apply"


def follow_verdict(parts: Parts, result: StepResult) -> bool:
    """Do what follows from the step that the state has just counted; return whether the run went back.

    Raises DoNotRestartError, on every rank alike, where the policy or its bounds say so.
    """
    state, guard = parts.state, parts.guard
    verdict, step = guard.verdict, state.step
    if verdict.kind == "sound":
        return False
    count = batch_size(parts.recipe.batch, step)
    samples = state.consumed_samples - count, count
    what = _told(verdict, step, result)
    done = rewind(parts) if verdict.action == "rewind" else None
    action = "rewound" if done else {"apply": "applied", "stop": "stopped"}.get(verdict.action, "skipped")
    documents = ""
    if guard.log is not None:
        documents = guard.log.note(step, action, verdict, result, samples, done)
    if done is not None:
        limit = parts.recipe.resilience.guard
        parts.sinks.message(
            f"{what}: back to step {done.to_step}, samples {done.first_sample} to "
            f"{done.first_sample + done.num_samples - 1} are left out; rewind {len(state.guard.rewound_at)}, at most "
            f"{limit.max_rewinds} within {limit.rewind_period_steps} steps{documents}"
        )
        return True
    if verdict.action == "rewind":
        parts.sinks.message(f"no checkpoint from before step {state.guard.bad_since} to go back to")
    if verdict.action != "apply" or state.guard.bad_since == step:
        parts.sinks.message(f"{what}{documents}")
    _refuse(parts, verdict, what)
    return False


def _told(verdict: Verdict, step: int, result: StepResult) -> str:
    """Return the step in words: what was found, compared with what, and what became of the step."""
    done = "" if verdict.action == "apply" else " skipped"
    if verdict.loss is None or verdict.grad_norm is None:
        return f"step {step}{done}: loss {result.loss}, gradient norm {result.grad_norm}"
    what, value, band = "loss", result.loss, verdict.loss
    if verdict.kind == "gradient spike":
        what, value, band = "gradient norm", result.grad_norm, verdict.grad_norm
    return f"step {step}{done}: {what} {value:.4g} is a spike (median {band.median:.4g}, limit {band.limit:.4g})"


def _refuse(parts: Parts, verdict: Verdict, what: str) -> None:
    """Raise DoNotRestartError where the run may not go on."""
    settings, skips = parts.recipe.resilience, parts.state.consecutive_skips
    if verdict.exhausted:
        raise DoNotRestartError(
            f"{what}: the run went back {settings.guard.max_rewinds} times within {settings.guard.rewind_period_steps} "
            "steps already (resilience.guard.max_rewinds); lower the learning rate or look at the data in guard.jsonl"
        )
    if verdict.action == "stop":
        key = "on_nan" if verdict.kind == "not finite" else "on_spike"
        raise DoNotRestartError(f"{what}: the recipe says stop (resilience.guard.{key})")
    if must_stop(skips, settings.max_skipped_steps):
        had = "a NaN or Inf loss or gradient" if verdict.kind == "not finite" else "a spike, or NaN or Inf"
        raise DoNotRestartError(
            f"{skips} steps in a row had {had} (resilience.max_skipped_steps);"
            " lower the learning rate or look at the data of these steps"
        )
