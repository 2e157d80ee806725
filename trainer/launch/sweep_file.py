"""SWEEP/sweep.json: what each task of a sweep is. Read by the tasks themselves, by `trainer status` and `cancel`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from trainer.core.durable import replace_text
from trainer.core.errors import Problem, RefusedError

FORMAT, VERSION = "trainer-sweep", 1
_NAME = "sweep.json"
_NAME_CHARACTERS = 95
"""Of run.name in the names of the tasks: with the number they are as long as a run.name may be."""


@dataclass(frozen=True)
class Task:
    """One run of a sweep."""

    number: int
    """Counted from 1: the index in the job array."""
    name: str
    """run.name, and the name of its directory in the sweep's."""
    values: dict[str, Any]
    """What sets it apart from the other tasks, by dotted key."""

    def overrides(self, directory: Path) -> list[str]:
        """Return the overrides of this task, for a sweep in ``directory``."""
        own = [f"{key}={as_yaml(value)}" for key, value in self.values.items()]
        return [*own, f"run.name={as_yaml(self.name)}", f"run.directory={as_yaml(str(directory / self.name))}"]


@dataclass(frozen=True)
class Sweep:
    """A recipe, and the runs that are made of it."""

    recipe: str
    """Absolute path."""
    overrides: list[str]
    """What all tasks share."""
    tasks: list[Task]


def task_stem(name: str) -> str:
    """Return what the names of all tasks of a sweep begin with, before ``-0001``; ``name`` is its run.name."""
    return name[:_NAME_CHARACTERS]


def as_yaml(value: Any) -> str:
    """Return one value as YAML text: JSON is, but for what YAML does not take unescaped."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)


def write_sweep(directory: Path, sweep: Sweep) -> None:
    """Write SWEEP/sweep.json. Raises OSError."""
    replace_text(directory / _NAME, _text(sweep))


def is_written(directory: Path, sweep: Sweep) -> bool:
    """Return whether SWEEP/sweep.json says exactly this. Raises RefusedError where it says anything else.

    Tasks that wait, run or start again read it: it must go on saying what they were submitted for.
    """
    path = directory / _NAME
    if not os.path.lexists(path):
        return False
    other = read_sweep(directory)
    if other is None:
        rule = "is there, but can't be read"
    elif _text(other) == _text(sweep):
        return True
    else:
        names = ("recipe", "overrides", "tasks")
        parts = [name for name in names if _text(replace(sweep, **{name: getattr(other, name)})) != _text(sweep)]
        rule = f"is of a sweep with other {' and '.join(parts)}, whose tasks read it whenever they start"
    raise RefusedError(Problem(str(path), None, rule, "choose another run.directory"), title="sweep refused")


def withdraw_sweep(directory: Path) -> None:
    """Delete SWEEP/sweep.json: no job was submitted for it."""
    (directory / _NAME).unlink(missing_ok=True)


def _text(sweep: Sweep) -> str:
    return json.dumps({"format": FORMAT, "version": VERSION, **asdict(sweep)}, indent=2) + "\n"


def read_sweep(directory: Path) -> Sweep | None:
    """Return the sweep in ``directory``, None where there is none that can be read."""
    try:
        content: object = json.loads((directory / _NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    fields = cast("dict[str, Any]", content)
    if fields.get("format") != FORMAT or fields.get("version") != VERSION:
        return None
    try:
        tasks = [Task(int(task["number"]), str(task["name"]), dict(task["values"])) for task in fields["tasks"]]
        overrides = [str(text) for text in fields["overrides"]]
        return Sweep(str(fields["recipe"]), overrides, tasks) if tasks else None
    except (KeyError, TypeError, ValueError):
        return None


def task_of_sweep(run_directory: Path) -> int | None:
    """Return the number of the task whose run this is, None where it is not in a sweep."""
    sweep = read_sweep(run_directory.parent)
    return next((task.number for task in sweep.tasks if task.name == run_directory.name), None) if sweep else None
