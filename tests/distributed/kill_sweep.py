"""Kill one run in every step of saving and at random: what was committed loads, and it ends as one left in peace.

usage: kill_sweep.py --seed N [--kills 60] [--layout zero2|pipeline2|both]

Each start must commit something new before it is killed. After each kill every committed checkpoint is opened and
hashed. In the end losses, weights and moments must equal an undisturbed run's to the last bit.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from forked_runs import Kill, Trainer

from trainer.checkpoint import layout
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.verify import damaged_files

LAYOUTS: dict[str, dict[str, Any]] = {
    "zero2": {"deepspeed": {"base": "zero2"}},
    "pipeline2": {"deepspeed": {"base": "zero1"}, "parallel": {"pipeline": 2}},
}
EVERY_STEPS = 2
STEPS_A_KILL = 5
"""No kill lets a run go further than this on average."""

EVERY_RANK, FIRST_RANK = "01", "0"
POINTS = [
    # point, ranks that reach it, kinds of death, only in asynchronous saves
    ("checkpoint.begin", EVERY_RANK, ["kill"], False),
    ("checkpoint.copied", EVERY_RANK, ["kill"], True),
    ("checkpoint.before_shard", EVERY_RANK, ["kill"], False),
    ("checkpoint.in_shard", EVERY_RANK, ["kill", "truncate"], False),
    ("checkpoint.shard_written", EVERY_RANK, ["kill", "truncate"], False),
    ("checkpoint.before_manifest", FIRST_RANK, ["kill"], False),
    ("checkpoint.before_rename", FIRST_RANK, ["kill", "truncate"], False),
    ("checkpoint.before_pointer", FIRST_RANK, ["kill"], False),
    ("checkpoint.committed", FIRST_RANK, ["kill"], False),
    ("checkpoint.before_prune", FIRST_RANK, ["kill"], False),
    ("checkpoint.in_prune", FIRST_RANK, ["kill"], False),
]


@dataclass(frozen=True)
class Attempt:
    """How one start is to die: at a fault point of the save after the next, or a moment after a commit."""

    asynchronous: bool
    point: str | None = None
    rank: str = "0"
    kind: str = "kill"

    @property
    def name(self) -> str:
        """The place in the protocol, for the summary."""
        return f"{self.point or 'any moment'} ({'asynchronous' if self.asynchronous else 'synchronous'})"


def plan(draw: random.Random) -> Iterator[Attempt]:
    """Yield attempts for ever, in rounds: each point once synchronously and once not, as often at a random moment."""
    while True:
        attempts = [
            Attempt(asynchronous, point, draw.choice(ranks), draw.choice(kinds))
            for point, ranks, kinds, only_asynchronous in POINTS
            for asynchronous in ((True,) if only_asynchronous else (False, True))
        ]
        attempts += [Attempt(asynchronous) for asynchronous in (False, True) for _ in range(5)]
        draw.shuffle(attempts)
        yield from attempts


def newest(run: Path) -> int:
    """Return the newest committed step, 0: none."""
    return max((step for step, _ in layout.step_directories(run)), default=0)


def refuse_damage(run: Path) -> int:
    """Open and hash every checkpoint that exists; return how many. A step directory is one, or the test fails."""
    directories = sorted(layout.checkpoints_directory(run).glob("step-*"))
    assert [path for _, path in layout.step_directories(run)] == directories
    for directory in directories:
        assert damaged_files(directory) == [], directory
        CheckpointReader(directory)
    return len(directories)


def tensors(run: Path) -> tuple[int, dict[tuple[str, str], torch.Tensor]]:
    """Return step and every tensor of a run's newest checkpoint: weights and optimizer state."""
    found = layout.newest(run)
    assert found is not None
    reader, manifest = CheckpointReader(found[1]), layout.read_manifest(found[1])
    assert manifest is not None
    held = [(name, key) for name, entry in manifest["tensors"].items() for key in entry["states"]]
    return found[0], {(name, key): reader.whole(name, key) for name, key in held}


class Sweep:
    """One run that is killed, beside one that is not."""

    def __init__(self, trainer: Trainer, layout_name: str, attempts: Sequence[Attempt], draw: random.Random) -> None:
        self.trainer, self.attempts, self.draw = trainer, attempts, draw
        self.steps = STEPS_A_KILL * len(attempts) + 20
        settings: dict[str, Any] = LAYOUTS[layout_name] | {
            "checkpoint": {"every_steps": EVERY_STEPS, "keep_last": 2, "keep_every_steps": 50},
            "evaluation": {"every_steps": 50},
        }
        self.straight, self.killed = (
            trainer.recipe(f"{layout_name}-{name}", **settings, run={"steps": self.steps})
            for name in ("straight", "killed")
        )
        self.run = trainer.directory / self.killed.stem
        self.died: Counter[str] = Counter()
        self.checked = 0

    def kill(self, attempt: Attempt) -> None:
        """Start, let it commit, kill it, and look at what is left."""
        before = newest(self.run)
        overrides = [f"checkpoint.asynchronous={str(attempt.asynchronous).lower()}"] if attempt.asynchronous else []
        if attempt.point is None:
            victims = self.draw.choice([[0], [1], [0, 1]])
            target = before + EVERY_STEPS * self.draw.randint(0, 1)
            kill = Kill(run=self.run, newer_than=target, delay_seconds=self.draw.uniform(0, 0.12), victims=victims)
            codes = self.trainer.train(
                self.killed, *overrides, kill=kill, grace_seconds=self.draw.choice([0.0, self.draw.uniform(0, 0.3)])
            )
        else:
            # Pruning comes after a commit, and its step is the one that goes.
            step = "*" if attempt.point.endswith("prune") else before + 2 * EVERY_STEPS
            faults = f"{attempt.point}:{attempt.rank}:{step}:{attempt.kind}"
            codes = self.trainer.train(self.killed, *overrides, faults=faults)
        said = self.killed.with_suffix(".out").read_text()[-2000:]
        assert -9 in codes, f"{attempt}: nobody was killed, exit codes {codes}\n{said}"
        assert newest(self.run) > before, f"{attempt}: killed before it had committed anything new\n{said}"
        self.checked += refuse_damage(self.run)
        self.died[attempt.name] += 1

    def go(self, say: Callable[[str], None]) -> None:
        """Kill the run as often as asked, let it finish, compare."""
        began = time.monotonic()
        self.trainer.check(self.trainer.train(self.straight), self.straight)
        for number, attempt in enumerate(self.attempts, 1):
            self.kill(attempt)
            say(f"kill {number}: {attempt.name} rank {attempt.rank} {attempt.kind}, committed step {newest(self.run)}")
        assert newest(self.run) < self.steps, "the last kill came after the last step"
        self.trainer.check(self.trainer.train(self.killed), self.killed)
        status = self.trainer.status(self.run.name)
        assert status["attempt"] >= len(self.attempts) + 1
        assert (status["state"], status["step"]) == ("finished", self.steps)
        assert self.trainer.metrics(self.run.name) == self.trainer.metrics(self.straight.stem), "losses differ"
        (step, expected), (found_step, found) = tensors(self.straight.with_suffix("")), tensors(self.run)
        assert (found_step, found.keys()) == (step, expected.keys()) == (self.steps, expected.keys())
        different = [key for key in expected if not torch.equal(found[key], expected[key])]
        assert different == [], f"tensors differ: {different}"
        left = [path.name for path in [*self.run.iterdir(), *layout.checkpoints_directory(self.run).iterdir()]]
        assert [name for name in left if ".tmp-" in name] == [], left
        say(
            f"{self.run.name}: {len(self.attempts)} kills, {status['attempt']} attempts, {self.steps} steps; after"
            f" kills {self.checked} committed checkpoints opened and hashed, none damaged; losses and"
            f" {len(expected)} tensors identical; {time.monotonic() - began:.0f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--layout", choices=[*LAYOUTS, "both"], default="both")
    arguments = parser.parse_args()

    def say(text: str) -> None:
        print(text, flush=True)

    with tempfile.TemporaryDirectory(prefix="kill-sweep-") as directory, Trainer(Path(directory)) as trainer:
        for name in LAYOUTS if arguments.layout == "both" else [arguments.layout]:
            draw = random.Random(f"{arguments.seed} {name}")
            sweep = Sweep(trainer, name, list(itertools.islice(plan(draw), arguments.kills)), draw)
            sweep.go(say)
            for place, times in sorted(sweep.died.items()):
                say(f"  {times:3d} {place}")
    say(f"seed {arguments.seed}: passed")


if __name__ == "__main__":
    main()
