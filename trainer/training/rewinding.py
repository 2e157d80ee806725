"""Go back to a checkpoint in the running process, and go on behind the data that led away from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.select import choose_before
from trainer.core import phases
from trainer.resilience.guard import Rewind
from trainer.telemetry.throughput import Stopwatch
from trainer.training.resume import Resumption, restore_generators
from trainer.training.state import TrainState

if TYPE_CHECKING:
    from trainer.training.loop import Parts


def rewind(parts: Parts) -> Rewind | None:
    """Load the newest good checkpoint of before the bad steps; None, with nothing changed, if there is none.

    Weights, optimizer, counters, random generators, logs and curves are as they were then; the data goes on behind the
    newest step. Checkpoints in between are deleted, and the one that was loaded is committed anew with the samples that
    are left out, so that a restart goes on alike. Collective. Raises CheckpointError, on every rank alike.
    """
    now = parts.state
    assert now.guard.bad_since is not None
    parts.saver.settle()
    phases.mark("load", detail="going back to a checkpoint")
    directory = Path(parts.recipe.run.directory)
    restore = Stopwatch()
    with restore:
        found = choose_before(directory, now.guard.bad_since, parts.ranks, parts.sinks.message)
    if found is None:
        return None
    reader = CheckpointReader(found)
    state = TrainState.from_json(reader.state["train"])
    done = Rewind(now.step, state.step, state.consumed_samples, now.consumed_samples - state.consumed_samples)
    state.consumed_samples = now.consumed_samples
    state.guard.rewinds = [*state.guard.rewinds, done]
    state.guard.rewound_at = [*now.guard.rewound_at, now.step]
    state.guard.spikes = now.guard.spikes
    with restore:
        parts.engine.load_state(reader, state.optimizer_steps)
    restore_generators(Resumption(parts.recipe, reader, parts.ranks, state, parts.sinks.message))
    now.go_back(state)
    parts.loader.seek(state.consumed_samples, state.step)
    parts.sinks.close()
    parts.sinks.replace(parts.open_sinks(state.step, restore.seconds))
    parts.saver.go_back()
    return done
