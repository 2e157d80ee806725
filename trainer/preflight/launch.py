"""Rules about what goes into SLURM scripts and paths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

from trainer.core.errors import Problem
from trainer.preflight.facts import Facts, Failing, Rule

# minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS (sbatch --time); unlimited leaves no time for a last checkpoint
TIME = re.compile(r"(?:(\d+)-(\d{1,2})(?::(\d{1,2}))?(?::(\d{1,2}))?|(\d+)(?::(\d{1,2}))?(?::(\d{1,2}))?)")
MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE)
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._,@+-]*")
# sbatch --constraint: features with & | * ( ) [ ]; --exclude: node01,node[02-04]
PATTERNS = {
    "partition": WORD,
    "account": WORD,
    "qos": WORD,
    "constraint": re.compile(r"[A-Za-z0-9\[(][A-Za-z0-9._,&|*()\[\]-]*"),
    "exclude": re.compile(r"[A-Za-z0-9][A-Za-z0-9._,\[\]-]*"),
}
CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def time_seconds(text: str) -> int | None:
    """Return the seconds of a SLURM time limit, or None if sbatch would not take it."""
    match = TIME.fullmatch(text)
    if match is None:
        return None
    days, day_hours, day_minutes, day_seconds, first, second, third = (
        int(part) if part else 0 for part in match.groups()
    )
    if match[1] is not None:
        return ((days * 24 + day_hours) * 60 + day_minutes) * 60 + day_seconds
    if match[7] is not None:
        return (first * 60 + second) * 60 + third
    return first * 60 + second


def _time(facts: Facts) -> Iterator[Problem]:
    slurm = facts.recipe.launch.slurm
    seconds = time_seconds(slurm.time)
    if seconds is None or seconds == 0:
        rule = "is no time limit that sbatch takes"
        yield Problem("launch.slurm.time", slurm.time, rule, "write minutes, HH:MM:SS or D-HH:MM:SS, e.g. 24:00:00")
    elif slurm.signal_seconds >= seconds:
        rule = f"leaves no time to train in launch.slurm.time = {slurm.time}"
        fix = f"use less than {seconds}, or ask for more time"
        yield Problem("launch.slurm.signal_seconds", slurm.signal_seconds, rule, fix)


def _memory(facts: Facts) -> Iterator[Problem]:
    memory = facts.recipe.launch.slurm.memory_per_node
    if memory is not None and not MEMORY.fullmatch(memory):
        rule = "is no amount of memory that sbatch takes"
        yield Problem("launch.slurm.memory_per_node", memory, rule, "write a whole number and K, M, G or T, e.g. 64G")


def _words(facts: Facts) -> Iterator[Problem]:
    """``#SBATCH`` lines are no shell: quoting does not help there, only refusing does."""
    for name, pattern in PATTERNS.items():
        value = getattr(facts.recipe.launch.slurm, name)
        if value is not None and not pattern.fullmatch(value):
            rule = "has characters that may not be written into an #SBATCH line"
            yield Problem(
                f"launch.slurm.{name}", value, rule, "use letters, digits and the signs sbatch(1) names for it"
            )


def _mpi(facts: Facts) -> Iterator[Problem]:
    """``srun --mpi`` is an option of srun; under torchrun its tasks are agents, not ranks."""
    slurm = facts.recipe.launch.slurm
    if slurm.mpi != "none" and slurm.starter != "srun":
        rule = f"has no effect with launch.slurm.starter = {slurm.starter}"
        yield Problem("launch.slurm.mpi", slurm.mpi, rule, "remove it, or set launch.slurm.starter: srun")


def _control(facts: Facts) -> Iterator[Problem]:
    """Paths and setup lines are written into scripts, logs and status files, one a line."""
    for key, text in _texts(facts.recipe.model_dump(mode="json"), ""):
        if CONTROL.search(text):
            yield Problem(key, text, "has a line break or another control character", "remove it")


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, below in cast("dict[str, Any]", value).items():
            yield from _texts(below, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, below in enumerate(cast("list[Any]", value)):
            yield from _texts(below, f"{key}.{index}")


RULES = (
    Rule("SLURM time limit", _time, Failing({"launch.slurm.time": "1 day"})),
    Rule("time after the signal", _time, Failing({"launch.slurm.time": "2", "launch.slurm.signal_seconds": 300})),
    Rule("SLURM memory", _memory, Failing({"launch.slurm.memory_per_node": "64 gigabytes"})),
    Rule("SLURM words", _words, Failing({"launch.slurm.partition": "gpu; rm -rf x"})),
    Rule("SLURM injection", _words, Failing({"launch.slurm.account": "me --wrap=x"})),
    Rule("MPI of srun", _mpi, Failing({"launch.slurm.mpi": "pmix", "launch.slurm.starter": "mpirun"})),
    Rule("no control characters", _control, Failing({"run.directory": "runs/a\nb"})),
)
