"""The training loop: each line a named part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trainer.checkpoint.agreement import Ranks
from trainer.config.batch_schedule import batch_size
from trainer.config.derive import Derived
from trainer.config.run import Recipe
from trainer.core import faults
from trainer.data.loader import TrainLoader
from trainer.engine.base import Requests, TrainEngine
from trainer.evaluation.validation import Validation
from trainer.optim.schedules import multiplier
from trainer.telemetry.sinks.base import Fanout
from trainer.telemetry.throughput import StepClock
from trainer.training.evaluating import early_end, evaluate_if_due, is_due
from trainer.training.guarding import Guard, follow_verdict
from trainer.training.records import step_record
from trainer.training.replica_check import ReplicaCheck
from trainer.training.saving import Saver
from trainer.training.state import TrainState

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
    """Open logs and curves, cut back to a step; of a start also how many seconds it took to restore it."""
    stop_requested: Callable[[], bool]
    """Whether this rank was asked to stop."""
    utilization: Callable[[float], float | None]
    """Tokens per second → model FLOPs utilization."""
    rank: int = 0


def train(parts: Parts) -> Outcome:
    """Run until the last step, early stopping, or until any rank was asked to stop.

    A checkpoint of the last step done is committed.
    """
    state, recipe, total = parts.state, parts.recipe, parts.derived.total_steps
    clock = StepClock()
    evaluate_if_due(parts)
    while state.step < total and early_end(parts) is None:
        clock.start_step()
        faults.reach("train.step", rank=parts.rank, step=state.step + 1)
        with clock.phase("data_wait"):
            batches = parts.loader.next_step()
        learning_rate = recipe.optimizer.learning_rate * multiplier(recipe.schedule, state.step + 1, total)
        with clock.phase("forward_backward"):
            requests = Requests(stop=parts.stop_requested() or parts.saver.must_stop)
            result = parts.engine.train_batch(batches, parts.guard.accept, learning_rate, requests)
        samples = batch_size(recipe.batch, state.step + 1)
        state.advance(samples, samples * recipe.data.sequence_length, result)
        parts.sinks.step(step_record(parts, result, clock.finish_step(), learning_rate))
        parts.saver.tell()
        if follow_verdict(parts, result):
            continue
        parts.replicas.if_due()
        stopping, best = result.stop_requests > 0, False
        if not stopping or state.step == total:
            best = evaluate_if_due(parts)
        last = stopping or state.step == total or early_end(parts) is not None
        if last or is_due(state.step, recipe.checkpoint.every_steps) or (best and recipe.checkpoint.keep_best):
            parts.saver.save(final=last)
        if stopping and state.step < total:
            return "stopped"
    parts.saver.save(final=True)
    return "finished"
