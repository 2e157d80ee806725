"""One logical state in every layout: loaded, written again, trained on (tests/distributed/reshape_sweep.py)."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from forked_runs import Trainer, tensors

from trainer.checkpoint import layout
from trainer.core.errors import RecipeError
from trainer.preflight.check import prepare

SAVED, STEPS = 5, 8
TOLERANCE = 1e-5
MAX_RANKS = 4
LLAMA = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "learning_rate": 3e-3},
    "lion": {"name": "lion", "learning_rate": 3e-4},
    "muon": {"name": "muon", "learning_rate": 3e-3},
}


@dataclass(frozen=True)
class Layout:
    """How ranks share a model."""

    zero: int
    data: int = 1
    pipeline: int = 1
    tensor: int = 1

    @property
    def world(self) -> int:
        return self.data * self.pipeline * self.tensor

    @property
    def name(self) -> str:
        degrees = (("dp", self.data), ("pp", self.pipeline), ("tp", self.tensor))
        return "-".join([f"z{self.zero}", *(f"{axis}{degree}" for axis, degree in degrees if degree > 1)])


def candidates() -> list[Layout]:
    """Every combination that fits on MAX_RANKS, legal or not."""
    found = (Layout(*degrees) for degrees in itertools.product(range(4), (1, 2, 4), (1, 2), (1, 2)))
    return [candidate for candidate in found if candidate.world <= MAX_RANKS]


def write_recipe(trainer: Trainer, run: str, where: Layout, optimizer: str = "adamw") -> Path:
    return trainer.recipe(
        run,
        model={"config": LLAMA, "dtype": "float32"},
        data={"validation": []},
        optimizer=OPTIMIZERS[optimizer],
        deepspeed={"base": f"zero{where.zero}"},
        parallel={"pipeline": where.pipeline, "tensor": where.tensor},
        # Every rank a file of its own, or all of a node one: both are read at every shape.
        checkpoint={"every_steps": SAVED, "keep_last": 5, "files": "node" if where.world == MAX_RANKS else "rank"},
    )


def refusal(trainer: Trainer, where: Layout, optimizer: str = "adamw") -> str | None:
    """Why the trainer refuses a layout, None if it takes it."""
    try:
        prepare(write_recipe(trainer, "asked", where, optimizer), world_size=where.world)
    except RecipeError as error:
        return "; ".join(problem.rule for problem in error.problems)
    return None


def train(trainer: Trainer, recipe: Path, where: Layout, before: str = "") -> None:
    codes = trainer.train(recipe, f"run.steps={STEPS}", world=where.world, before=before)
    assert set(codes) == {0}, (where.name, codes, recipe.with_suffix(".out").read_text()[-2000:])


def losses(trainer: Trainer, run: str) -> dict[int, float]:
    return {step: loss for (step, _), loss in trainer.metrics(run).items()}


@dataclass(frozen=True)
class Source:
    """An undisturbed run in one process."""

    run: Path
    losses: dict[int, float]
    saved: dict[tuple[str, str], torch.Tensor]


def undisturbed(trainer: Trainer, optimizer: str = "adamw") -> Source:
    run = f"source-{optimizer}"
    train(trainer, write_recipe(trainer, run, Layout(0), optimizer), Layout(0))
    directory = trainer.directory / run
    return Source(directory, losses(trainer, run), tensors(directory, SAVED))


def start_from(trainer: Trainer, source: Path, run: str) -> None:
    """Give ``run`` the checkpoint that ``source`` has of step SAVED, and no later one."""
    shutil.copytree(source, trainer.directory / run)
    shutil.rmtree(layout.step_directory(trainer.directory / run, STEPS), ignore_errors=True)


def goes_on(trainer: Trainer, source: Source, run: str, where: Layout, optimizer: str, before: str = "") -> float:
    """Resume ``run`` in a layout; return how far its losses are from the undisturbed run's."""
    train(trainer, write_recipe(trainer, run, where, optimizer), where, before=before)
    assert trainer.status(run)["resumed_step"] == SAVED
    found = losses(trainer, run)
    assert found.keys() == source.losses.keys()
    return max(abs(found[step] - source.losses[step]) for step in range(SAVED + 1, STEPS + 1))


def one_layout(trainer: Trainer, source: Source, where: Layout, optimizer: str = "adamw") -> float:
    """Load the state, write it again, train on. What is written equals what was loaded, bit for bit."""
    run = f"{optimizer}-{where.name}"
    start_from(trainer, source.run, run)
    difference = goes_on(trainer, source, run, where, optimizer, before="save_at_start")
    manifest = layout.read_manifest(layout.step_directory(trainer.directory / run, SAVED))
    assert manifest is not None
    assert manifest["world_size"] == where.world  # it was written anew, by these ranks
    again = tensors(trainer.directory / run, SAVED)
    assert again.keys() == source.saved.keys(), again.keys() ^ source.saved.keys()
    different = [key for key, value in source.saved.items() if not torch.equal(value, again[key])]
    assert not different, (where.name, different)
    shutil.rmtree(trainer.directory / run)
    return difference


def one_pair(trainer: Trainer, source: Source, first: Layout, second: Layout, optimizer: str = "adamw") -> float:
    """Train and save in one layout, resume in another."""
    name = f"pair-{first.name}-to-{second.name}"
    train(trainer, write_recipe(trainer, name, first, optimizer), first)
    start_from(trainer, trainer.directory / name, f"{name}-resumed")
    return goes_on(trainer, source, f"{name}-resumed", second, optimizer)
