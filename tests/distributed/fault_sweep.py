"""Break one rank in every way, at random places: each time the summary must name rank, host, phase and kind of failure.

usage: fault_sweep.py --seed N [--rounds 3] [--world 4]

The ranks are real ones over gloo. What is injected is known to this program alone; the supervisors see a process.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forked_runs import Trainer

STEP_PHASES = ("data", "forward", "backward", "optimizer", "log")
SAVE_EVERY = 4
WATCHDOG = {"grace_seconds": 3, "start_seconds": 120, "slow_seconds": 3, "report_seconds": 5, "straggler_steps": 2}
KINDS: list[tuple[str, tuple[str, ...], str]] = [
    # what happens, in which phases, class it must be given
    ("stop", STEP_PHASES, "stopped"),
    ("segfault", STEP_PHASES, "killed"),
    ("memory", ("data", "forward", "backward", "optimizer"), "host-out-of-memory"),
    ("exit", STEP_PHASES, "killed"),
    ("raise", ("forward",), "exception"),
    ("raise", ("data",), "exception"),
    ("raise", ("save",), "exception"),
    ("raise", ("log",), "exception"),
    ("lock", ("forward", "backward", "optimizer"), "hang"),
    ("sleep", ("data",), "hang"),
]
MORE_KINDS: list[tuple[str, tuple[str, ...], str]] = [
    ("kill", (*STEP_PHASES, "save", "evaluate"), "killed"),
    ("sleep", ("save", "evaluate", "log"), "hang"),
    ("enospc", ("save",), "disk"),
    ("eio", ("data",), "disk"),
    ("stop", ("save", "evaluate"), "stopped"),
    ("segfault", ("start", "load"), "killed"),
    ("raise", ("start", "load", "evaluate"), "exception"),
]


@dataclass(frozen=True)
class Injection:
    """One rank broken at one place."""

    kind: str
    phase: str
    rank: int
    step: int
    expected_class: str

    @property
    def fault(self) -> str:
        """As TRAINER_FAULTS takes it."""
        return f"phase.{self.phase}:{self.rank}:{self.step}:{self.kind}"


def draw(seed: int, world: int, kinds: list[tuple[str, tuple[str, ...], str]]) -> list[Injection]:
    """Return one injection of each kind, at a rank, phase and step drawn from the seed."""
    generator = random.Random(seed)
    drawn: list[Injection] = []
    for kind, phases, expected in kinds:
        phase = generator.choice(phases)
        step = {"save": SAVE_EVERY, "evaluate": SAVE_EVERY, "start": 0, "load": 0}.get(phase) or generator.randint(2, 6)
        drawn.append(
            Injection(kind, phase, generator.randrange(world), 0 if phase in ("start", "load") else step, expected)
        )
    generator.shuffle(drawn)
    return drawn


def inject(trainer: Trainer, injection: Injection, world: int, name: str) -> dict[str, Any]:
    """Run until the fault has ended the job; return failure.json."""
    recipe = trainer.recipe(
        name,
        resilience={"watchdog": WATCHDOG},
        checkpoint={"every_steps": SAVE_EVERY, "asynchronous": False},
        evaluation={"every_steps": SAVE_EVERY, "batches": 1},
        run={"steps": 12},
    )
    codes = trainer.train(recipe, world=world, faults=injection.fault, grace_seconds=8.0)
    said = recipe.with_suffix(".out").read_text()
    assert 0 not in codes, (injection, codes, said[-2000:])
    path = trainer.directory / name / "failure.json"
    assert path.exists(), (injection, codes, said[-2000:])
    return json.loads(path.read_text())


def faults_of(injection: Injection, found: dict[str, Any]) -> list[str]:
    """Return what is wrong about a summary."""
    expected = {
        "rank": injection.rank,
        "host": socket.gethostname(),
        "phase": injection.phase,
        "step": injection.step,
        "class": injection.expected_class,
    }
    wrong = [f"{name}: {found[name]!r}, not {value!r}" for name, value in expected.items() if found[name] != value]
    named = f"rank {injection.rank} on {expected['host']}"
    return wrong if named in found["cause"] else [*wrong, f"the cause does not say {named!r}"]


def main() -> None:
    """Sweep and say how many summaries were right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--world", type=int, default=4)
    options = parser.parse_args()
    wrong = total = 0
    with tempfile.TemporaryDirectory() as directory, Trainer(Path(directory)) as trainer:
        for number in range(options.rounds):
            for injection in draw(options.seed + number, options.world, KINDS + MORE_KINDS):
                started = time.monotonic()
                found = inject(trainer, injection, options.world, f"run-{total}")
                faults = faults_of(injection, found)
                total, wrong = total + 1, wrong + bool(faults)
                print(
                    f"{injection.fault:32} {time.monotonic() - started:5.1f} s  {found['cause']}  {faults or ''}",
                    flush=True,
                )
    print(f"seed {options.seed}: {total - wrong} of {total} summaries are right")
    assert not wrong


if __name__ == "__main__":
    main()
