"""``trainer check --on-node``: join the ranks a launcher has started, or start them, and check their nodes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import typer


def check_on_node(recipe: Path, overrides: list[str]) -> NoReturn:
    """Check the nodes for a recipe and end with exit code 0, 1 (a node is at fault) or 2 (recipe or environment)."""
    from trainer.core import environ
    from trainer.core.errors import RefusedError
    from trainer.preflight.check import prepare

    place = environ.detect(os.environ)
    if place is None:
        raise typer.Exit(_launch(recipe, overrides))
    environ.die_with_parent(os.environ)
    if place.needs_discovery:
        from trainer.launch.mpirun import discover

        place = discover(place)
    elif place.launcher == "slurm":
        from trainer.launch.address import reachable

        place = reachable(place)
    environ.export(place, os.environ)
    from trainer.allocation.run import Candidate, check_allocation

    try:
        prepared = prepare(recipe, overrides, place.world_size)
        candidate = Candidate(prepared.recipe, prepared.deepspeed)
    except (RefusedError, OSError) as error:
        # Rank 0 must hear of it: another node may see other files.
        candidate = Candidate(None, {}, str(error))
    code = check_allocation(place, candidate, os.environ, lambda text: print(text, flush=True))
    sys.stdout.flush()
    os._exit(code)  # as a rank ends: threads of torch may abort during interpreter shutdown


def _launch(recipe: Path, overrides: list[str]) -> int:
    """Start local ranks that check this machine."""
    from trainer.launch.local import run_local
    from trainer.preflight.check import prepare

    processes = prepare(recipe, overrides, None).recipe.launch.processes
    return run_local([sys.executable, "-m", "trainer", "check", str(recipe), *overrides, "--on-node"], processes)
