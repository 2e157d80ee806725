"""SWEEP/sweep.json: what each task of a sweep is. Read by the tasks themselves, by `trainer status` and `cancel`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from trainer.core.durable import replace_text

FORMAT, VERSION = "trainer-sweep", 1
_NAME = "sweep.json"


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


def as_yaml(value: Any) -> str:
    """Return one value as YAML text: JSON is, but for what YAML does not take unescaped."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)


def write_sweep(directory: Path, sweep: Sweep) -> None:
    """Write SWEEP/sweep.json. Raises OSError."""
    replace_text(
        directory / _NAME, json.dumps({"format": FORMAT, "version": VERSION, **asdict(sweep)}, indent=2) + "\n"
    )


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
