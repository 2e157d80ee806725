"""Mark which micro-batch a pipeline stage is at, for the supervisor beside the rank."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine

from trainer.core import phases
from trainer.core.phases import Phase


class MicroBatchMarks:
    """Marks each forward and backward pass of a step; stages are at different ones at a time."""

    def __init__(self, engine: PipelineEngine) -> None:
        """Have the instructions of ``engine``'s schedule marked while `step` is entered."""
        self._active = False
        self._done: dict[Phase, int] = {}
        instructions: dict[type, Callable[..., None]] = dict(cast("Any", engine)._INSTRUCTION_MAP)
        passes: tuple[tuple[type, Phase], ...] = (
            (schedule.ForwardPass, "forward"), (schedule.BackwardPass, "backward"),
        )  # fmt: skip
        for instruction, phase in passes:
            instructions[instruction] = self._marked(instructions[instruction], phase)
        cast("Any", engine)._INSTRUCTION_MAP = instructions

    @contextmanager
    def step(self) -> Generator[None]:
        """Count micro-batches from 0. Evaluation, which has forward passes too, marks its own phase."""
        self._active, self._done = True, {}
        try:
            yield
        finally:
            self._active = False

    def _marked(self, run: Callable[..., None], phase: Phase) -> Callable[..., None]:
        def marked(engine: PipelineEngine, **arguments: Any) -> None:
            if self._active:
                number = self._done.get(phase, 0)
                self._done[phase] = number + 1
                phases.mark(phase, micro_batch=number)
            run(engine, **arguments)

        return marked
