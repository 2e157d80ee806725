"""Rules about what goes into SLURM scripts and paths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from trainer.config.slurm import slurm_problems
from trainer.core.errors import Problem
from trainer.preflight.facts import Facts, Failing, Rule

# minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS (sbatch --time); unlimited leaves no time for a last checkpoint
TIME = re.compile(r"(?:(\d+)-(\d{1,2})(?::(\d{1,2}))?(?::(\d{1,2}))?|(\d+)(?::(\d{1,2}))?(?::(\d{1,2}))?)")
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


def _values(facts: Facts) -> Iterator[Problem]:
    """What goes into a batch script; the time limit has a rule of its own."""
    yield from (problem for problem in slurm_problems(facts.recipe.launch.slurm) if problem.key != "launch.slurm.time")


def _hosts(facts: Facts) -> Iterator[Problem]:
    """What says where ssh goes means nothing to the other launchers."""
    launch = facts.recipe.launch
    for name in ("hostfile", "include", "exclude"):
        value = getattr(launch, name)
        if value is not None and launch.launcher != "ssh":
            fix = "set launch.launcher: ssh, or remove it"
            yield Problem(f"launch.{name}", value, f"has no effect with launch.launcher = {launch.launcher}", fix)


def _stage(facts: Facts) -> Iterator[Problem]:
    stage = facts.recipe.launch.slurm.stage
    if stage is not None and not Path(stage).is_file():
        yield Problem("launch.slurm.stage", stage, "is no file", "make the archive with launch/stage.sh, or remove it")


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
    Rule("SLURM memory", _values, Failing({"launch.slurm.memory_per_node": "64 gigabytes"})),
    Rule("SLURM words", _values, Failing({"launch.slurm.partition": "gpu; rm -rf x"})),
    Rule("SLURM injection", _values, Failing({"launch.slurm.account": "me --wrap=x"})),
    Rule("SLURM options", _values, Failing({"launch.slurm.sbatch_options": {"wrap": "id"}})),
    Rule("modules", _values, Failing({"launch.slurm.modules": ["cuda; id"]})),
    Rule("environment", _values, Failing({"launch.slurm.environment": {"WORLD_SIZE": 8}})),
    Rule("secrets in the environment", _values, Failing({"launch.slurm.environment": {"HF_TOKEN": "hf_x"}})),
    Rule("secrets in setup lines", _values, Failing({"launch.slurm.setup": ["export WANDB_API_KEY=123abc"]})),
    Rule("container", _values, Failing({"launch.slurm.container": {"runtime": "pyxis", "image": "$(id)"}})),
    Rule("hosts of ssh", _hosts, Failing({"launch.hostfile": "hosts.txt"})),
    Rule("staged environment", _stage, Failing({"launch.slurm.stage": "/no/such/env.tar"})),
    Rule("MPI of srun", _mpi, Failing({"launch.slurm.mpi": "pmix", "launch.slurm.starter": "mpirun"})),
    Rule("no control characters", _control, Failing({"run.directory": "runs/a\nb"})),
)
