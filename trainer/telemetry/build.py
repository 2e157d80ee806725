"""Open the sinks a recipe asks for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from trainer.config.run import Recipe
from trainer.telemetry.sinks.base import Sink, Thinned
from trainer.telemetry.sinks.console import console_sink
from trainer.telemetry.sinks.jsonl import JsonlSink

logger = logging.getLogger(__name__)


def build_sinks(
    recipe: Recipe, run_directory: Path, resume_step: int, total_steps: int, console_stream: TextIO
) -> list[Sink]:
    """Open console, metrics.jsonl and TensorBoard on rank 0; hand them to :class:`Fanout`.

    ``resume_step`` is the last step the run keeps (0: a fresh start). ``total_steps`` is the last step it will do.
    Hand every step to the result: ``telemetry.log_every_steps`` is applied here. A file that can't be opened is
    reported on the console and left out.
    """
    console = console_sink(console_stream, recipe.run.name, resume_step, total_steps)
    sinks: list[Sink] = [console]

    def add(what: str, make: Callable[[], Sink]) -> None:
        try:
            sinks.append(Thinned(make(), recipe.telemetry.log_every_steps, total_steps))
        except OSError as error:
            logger.warning("%s is not written: %s", what, error)
            console.message(f"warning: {what} is not written: {error}")

    add("metrics.jsonl", lambda: JsonlSink(run_directory / "metrics.jsonl", resume_step))
    if recipe.telemetry.tensorboard:
        # Imported here: protobuf and tensorboard take 0.2 s that a run without them need not pay.
        from trainer.telemetry.sinks.tensorboard import TensorBoardSink

        add("tensorboard", lambda: TensorBoardSink(run_directory / "tensorboard", resume_step))
    return sinks
