"""Every legal layout of ZeRO, data, pipeline and tensor ranks reads the same logical state and writes it again.

usage: reshape_sweep.py --seed N [--pairs 12]

One process trains 5 steps and saves. Every layout on up to 4 ranks loads that, saves it at once (every weight and
moment must be equal, bit for bit) and trains 3 steps (losses within 1e-5 of the process that went on undisturbed). Then
pairs of layouts drawn by the seed, of which one trains and saves and the other goes on; then Lion and Muon in seven
layouts each. Prints a line a cell. Eight minutes on two cores.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import reshape
from forked_runs import Trainer
from reshape import TOLERANCE, Layout, Source

from trainer.core.errors import TrainerError

OTHER_OPTIMIZERS = (
    Layout(0, data=2), Layout(1, data=4), Layout(2, data=2), Layout(3, data=2), Layout(1, data=2, pipeline=2),
    Layout(1, data=2, tensor=2), Layout(0, pipeline=2),
)  # fmt: skip


class Cells:
    """What has been tried, a line each."""

    def __init__(self) -> None:
        self.num_passed = 0
        self.failed: list[str] = []

    def run(self, name: str, cell: Callable[[], float]) -> None:
        started = time.monotonic()
        try:
            difference = cell()
            assert difference < TOLERANCE, f"losses differ by {difference:.2e}"
            outcome, self.num_passed = f"ok, losses within {difference:.1e}", self.num_passed + 1
        except (AssertionError, OSError, TrainerError) as error:
            outcome = f"FAILED: {error}"
            self.failed.append(name)
        print(f"{name}: {outcome} ({time.monotonic() - started:.1f} s)", flush=True)


def legal_layouts(trainer: Trainer, optimizer: str, candidates: list[Layout]) -> list[Layout]:
    """Leave out what the trainer refuses, and say why."""
    legal: list[Layout] = []
    for candidate in candidates:
        reason = reshape.refusal(trainer, candidate, optimizer)
        if reason is None:
            legal.append(candidate)
        else:
            print(f"{optimizer} {candidate.name}: refused: {reason}", flush=True)
    return legal


def sweep_layouts(trainer: Trainer, cells: Cells, source: Source, optimizer: str, layouts: list[Layout]) -> None:
    for where in layouts:
        cells.run(
            f"{optimizer} {where.name}", lambda where=where: reshape.one_layout(trainer, source, where, optimizer)
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--pairs", type=int, default=12)
    arguments = parser.parse_args()
    draw, cells, started = random.Random(arguments.seed), Cells(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="reshape-sweep-") as folder, Trainer(Path(folder)) as trainer:
        source = reshape.undisturbed(trainer)
        layouts = legal_layouts(trainer, "adamw", reshape.candidates())
        sweep_layouts(trainer, cells, source, "adamw", layouts)
        pairs = draw.sample(
            [(first, second) for first in layouts for second in layouts if first != second], arguments.pairs
        )
        for first, second in pairs:
            cells.run(
                f"{first.name} to {second.name}",
                lambda first=first, second=second: reshape.one_pair(trainer, source, first, second),
            )
        for optimizer in ("lion", "muon"):
            other = reshape.undisturbed(trainer, optimizer)
            legal = legal_layouts(trainer, optimizer, list(OTHER_OPTIMIZERS))
            sweep_layouts(trainer, cells, other, optimizer, legal)
    seconds = time.monotonic() - started
    print(f"seed {arguments.seed}: {len(layouts)} layouts, {cells.num_passed} cells passed in {seconds:.0f} s")
    if cells.failed:
        raise SystemExit(f"seed {arguments.seed}: FAILED: " + ", ".join(cells.failed))


if __name__ == "__main__":
    main()
