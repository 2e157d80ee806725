"""Choose the checkpoint a start continues from; all ranks together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from trainer.checkpoint import layout
from trainer.checkpoint.agreement import Ranks
from trainer.checkpoint.verify import damaged_files
from trainer.core.errors import CheckpointError, Problem, RecipeError


def choose(
    run_directory: Path, resume: Literal["auto", "require", "never"], ranks: Ranks, say: Callable[[str], None]
) -> Path | None:
    """Return the newest undamaged checkpoint, None for a fresh start.

    Damaged ones are passed over, aloud. Raises RecipeError where ``resume`` forbids what is found, CheckpointError
    where checkpoints are there but all are damaged: starting over would bury them.
    """
    found = ranks.from_first([str(path) for _, path in layout.step_directories(run_directory)])
    if resume == "never" and found:
        raise RecipeError(
            Problem(
                "checkpoint.resume",
                "never",
                f"{run_directory} holds {len(found)} checkpoints",
                "use another run.directory, or checkpoint.resume=auto to continue",
            )
        )
    for name in reversed(found):
        directory = Path(name)
        # Ranks share the hashing: each takes every n-th file.
        found_by_rank = ranks.gather(damaged_files(directory, ranks.rank, ranks.world_size))
        problems = [problem for found_here in found_by_rank for problem in found_here]
        if not problems:
            return directory
        say(f"passing over damaged checkpoint {directory.name}: " + "; ".join(sorted(set(problems))))
    if found:
        raise CheckpointError(f"{run_directory}: all {len(found)} checkpoints are damaged; nothing was changed")
    if resume == "require":
        raise RecipeError(
            Problem(
                "checkpoint.resume", "require", f"{run_directory} holds no checkpoint", "use checkpoint.resume=auto"
            )
        )
    return None
