"""The training loop: each line a named part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trainer.checkpoint.agreement import Ranks
from trainer.config.batch_schedule import batch_size
from trainer.config.derive import Derived
from trainer.config.run import Recipe
from trainer.core import faults, phases
from trainer.data.loader import TrainLoader
from trainer.engine.base import TrainEngine
from trainer.evaluation.validation import Validation
from trainer.optim.schedules import multiplier
from trainer.resilience.requests import RequestSources
from trainer.telemetry.sinks.base import Fanout
from trainer.telemetry.throughput import StepClock
from trainer.training.evaluating import early_end, evaluate_if_due, is_due
from trainer.training.guarding import Guard, follow_verdict
from trainer.training.records import step_record
from trainer.training.replica_check import ReplicaCheck
from trainer.training.saving import Saver
from trainer.training.state import TrainState
from trainer.training.stragglers import Stragglers

Outcome = Literal["finished", "stopped"]


@dataclass
class Parts:
    """What the loop runs: assembled by trainer.training.build."""

    recipe: Recipe
    derived: Derived
    engine: TrainEngine
    loader: TrainLoader
    validation: Validation
    state: TrainState
    sinks: Fanout
    saver: Saver
    guard: Guard
    replicas: ReplicaCheck
    ranks: Ranks
    open_sinks: Callable[[int, float], Fanout]
    """Open logs and curves, cut back to a step."""
    requests: RequestSources
    utilization: Callable[[float], float | None]
    """Tokens per second → model FLOPs utilization."""
    stragglers: Stragglers
    rank: int = 0


def train(parts: Parts) -> Outcome:
    """Run until the last step, early stopping, or until any rank was asked to stop.

    A checkpoint of the last step done is committed.
    """
    state, recipe, total = parts.state, parts.recipe, parts.derived.total_steps
    clock = StepClock()
    parts.requests.begin(state.step, parts.saver)
    evaluate_if_due(parts)
    while state.step < total and early_end(parts) is None:
        clock.start_step()
        phases.mark("data", step=state.step + 1)
        faults.reach("train.step", rank=parts.rank, step=state.step + 1)
        with clock.phase("data_wait"):
            batches = parts.loader.next_step()
        learning_rate = recipe.optimizer.learning_rate * multiplier(recipe.schedule, state.step + 1, total)
        with clock.phase("forward_backward"):
            evaluation_due = is_due(state.step + 1, recipe.evaluation.every_steps)
            requests = parts.requests.ask(state.step + 1, evaluation_due=evaluation_due)
            result = parts.engine.train_batch(batches, parts.guard.accept, learning_rate, requests)
        phases.mark("log")
        samples = batch_size(recipe.batch, state.step + 1)
        state.advance(samples, samples * recipe.data.sequence_length, result)
        times = clock.finish_step()
        parts.stragglers.observe(times.step_seconds)
        parts.sinks.step(step_record(parts, result, times, learning_rate))
        parts.saver.tell()
        stopping, best = parts.requests.heed(result), False
        if follow_verdict(parts, result):
            continue
        parts.replicas.if_due()
        if not stopping or state.step == total:
            best = evaluate_if_due(parts)
        last = stopping or state.step == total or early_end(parts) is not None
        due = result.save_requests > 0 or is_due(state.step, recipe.checkpoint.every_steps)
        if last or due or (best and recipe.checkpoint.keep_best):
            parts.saver.save(final=last)
        if stopping and state.step < total:
            return "stopped"
    parts.saver.save(final=True)
    return "finished"
