"""Killed or stopped and resumed equals undisturbed, bit for bit: every layout, dtype and way to save.

usage: resume_matrix.py

Layouts: ZeRO 0-3, optimizer state on the CPU, two pipeline stages, two tensor ranks; float32 and bfloat16; checkpoints
written in the background and in the foreground. Dropout is on. Losses, gradient norms, all weights and all moments must
be equal. Prints a line a cell. Five minutes on two cores.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from forked_runs import Trainer, exact_lines, tensors

STEPS, EVERY, DISTURBED = 12, 4, 11
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero0": {"deepspeed": {"base": "zero0"}},
    "zero1": {"deepspeed": {"base": "zero1"}},
    "zero2": {"deepspeed": {"base": "zero2"}},
    "zero3": {"deepspeed": {"base": "zero3"}},
    "offload": {"deepspeed": {"base": "zero2_offload"}},
    "pipeline": {"deepspeed": {"base": "zero1"}, "parallel": {"pipeline": 2}},
    "tensor": {"deepspeed": {"base": "zero1"}, "parallel": {"tensor": 2}},
}
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Cell:
    """One way to run and to save."""

    layout: str
    dtype: str
    asynchronous: bool

    @property
    def name(self) -> str:
        return f"{self.layout}-{self.dtype}-{'asynchronous' if self.asynchronous else 'synchronous'}"

    @property
    def killed(self) -> bool:
        """Whether it is disturbed by a kill, else by a signal that asks it to stop: half of the cells each."""
        return (list(LAYOUTS).index(self.layout) + DTYPES.index(self.dtype) + self.asynchronous) % 2 == 0


CELLS = [Cell(*values) for values in itertools.product(LAYOUTS, DTYPES, (False, True))]
DIAGONAL = [cell for number, cell in enumerate(CELLS) if number % 4 == (0, 3, 1, 2)[number // 4 % 4]]
"""Every layout once, with both dtypes, both ways to save and both disturbances among them."""


class Matrix:
    """Runs cells; undisturbed runs are shared by those that compute the same."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def prove(self, cell: Cell) -> None:
        """Raise AssertionError unless the resumed run ends as the undisturbed one does."""
        trainer, straight = self._trainer, f"{cell.layout}-{cell.dtype}-straight"
        if not (trainer.directory / straight).exists():  # saves in the foreground, which must make no difference
            recipe = self._recipe(straight, cell, asynchronous=False)
            trainer.check(self._train(recipe), recipe)
        recipe = self._recipe(cell.name, cell, asynchronous=cell.asynchronous)
        if cell.killed:
            assert self._train(recipe, faults=f"train.step:*:{DISTURBED}:kill") == [-9, -9]
        else:
            assert self._train(recipe, faults=f"train.step:1:{DISTURBED}:signal") == [75, 75]
        trainer.check(self._train(recipe), recipe)
        resumed = trainer.status(cell.name)["resumed_step"]
        # Killed at once after step 10, the save of step 8 may still be in flight; it began when that of 4 had ended.
        possible = ({EVERY, 2 * EVERY} if cell.asynchronous else {2 * EVERY}) if cell.killed else {DISTURBED}
        assert resumed in possible, resumed
        assert exact_lines(trainer, cell.name) == exact_lines(trainer, straight)
        expected, found = tensors(trainer.directory / straight), tensors(trainer.directory / cell.name)
        assert expected.keys() == found.keys()
        different = [key for key, value in expected.items() if not torch.equal(value, found[key])]
        assert not different, different
        assert {key for _, key in found} == {"weight", "exp_avg", "exp_avg_sq"}

    def _recipe(self, run: str, cell: Cell, *, asynchronous: bool) -> Path:
        return self._trainer.recipe(
            run,
            model={"dtype": cell.dtype},
            data={"validation": []},
            checkpoint={"every_steps": EVERY, "asynchronous": asynchronous},
            **LAYOUTS[cell.layout],
        )

    def _train(self, recipe: Path, faults: str = "") -> list[int]:
        return self._trainer.train(recipe, f"run.steps={STEPS}", faults=faults)


def main() -> None:
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="resume-matrix-") as folder, Trainer(Path(folder)) as trainer:
        matrix = Matrix(trainer)
        for cell in CELLS:
            started = time.monotonic()
            try:
                matrix.prove(cell)
                outcome = "identical"
            except AssertionError as error:
                outcome = f"FAILED: {error}"
                failed.append(cell.name)
            how = "killed" if cell.killed else "stopped"
            print(f"{cell.name}, {how}: {outcome} ({time.monotonic() - started:.1f} s)", flush=True)
    print(f"{len(CELLS) - len(failed)} of {len(CELLS)} cells identical")
    if failed:
        raise SystemExit(f"FAILED: {', '.join(failed)}")


if __name__ == "__main__":
    main()
