"""Loss over the validation sources."""

from __future__ import annotations

import itertools
import time

import torch
from torch import distributed

from trainer.config.data import ValidationSource
from trainer.config.run import Recipe
from trainer.core import phases
from trainer.data.loader import validation_batches
from trainer.engine.base import TrainEngine
from trainer.telemetry.record import EvaluationRecord, perplexity

_AT_A_TIME = 8
"""Micro-batches given to the engine together: pipeline stages then work at the same time."""


class Validation:
    """Evaluates every validation source; called by all ranks together."""

    def __init__(self, recipe: Recipe, rank: int, world_size: int, vocab_size: int) -> None:
        self._recipe = recipe
        self._rank = rank
        self._world_size = world_size
        self._vocab_size = vocab_size
        for source in recipe.data.validation:  # a bad source must not be found out after an hour of training
            self._batches(source)

    def run(self, engine: TrainEngine, step: int) -> list[EvaluationRecord]:
        """Return one record a source, the same on every rank."""
        return [self._evaluate(source, engine, step) for source in self._recipe.data.validation]

    def _batches(self, source: ValidationSource):
        batch = self._recipe.batch
        return validation_batches(
            self._recipe.data,
            source.path,
            batch.micro_size,
            self._rank,
            self._world_size,
            batch.global_size,
            self._recipe.evaluation.batches,
            self._vocab_size,
        )

    def _evaluate(self, source: ValidationSource, engine: TrainEngine, step: int) -> EvaluationRecord:
        started = phases.working_seconds()
        loss, count, number = 0.0, 0, 0
        batches = iter(self._batches(source))
        phases.mark("evaluate", step=step, detail=source.name)
        while some := list(itertools.islice(batches, _AT_A_TIME)):
            phases.mark("evaluate", step=step, micro_batch=number, detail=source.name)
            number += len(some)
            some_loss, some_count = engine.evaluate(some)
            loss += some_loss
            count += some_count
        totals = torch.tensor([loss, count], dtype=torch.float64, device=engine.device)
        distributed.all_reduce(totals)
        mean = float(totals[0] / totals[1].clamp(min=1))
        return EvaluationRecord(
            step=step,
            name=source.name,
            validation_loss=mean,
            perplexity=perplexity(mean),
            target_tokens=int(totals[1]),
            seconds=phases.working_seconds() - started,
            time_unix=time.time(),
        )
