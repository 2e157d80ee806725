"""Plan a sweep: every combination of the values is a run of its own, all are checked before one is submitted."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from trainer.config.yaml_text import YamlTextError, parse_yaml
from trainer.core.errors import Problem, RecipeError, RefusedError
from trainer.core.redact import redacted, redacted_text
from trainer.launch.sweep_file import Sweep, Task, as_yaml, task_stem

MAXIMUM_TASKS = 500
"""Each is checked here, and SLURM takes arrays of 1000 by default (MaxArraySize)."""
_SHOWN_PROBLEMS = 20
_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)+", re.ASCII)
_SAME_FOR_ALL = ("launch.", "run.name", "run.directory", "run.group_access")


def read_axes(options: Iterable[str]) -> dict[str, list[Any]]:
    """Return the values of each ``KEY=V1,V2,...`` by key. Raises RefusedError with every problem."""
    axes: dict[str, list[Any]] = {}
    problems: list[Problem] = []
    for option in options:
        key, equals, text = option.partition("=")
        values, problem = _values(text) if equals and _KEY.fullmatch(key) else (None, "is not KEY=V1,V2,...")
        if problem is None and key.startswith(_SAME_FOR_ALL):
            problem = "is the same for all tasks of a sweep"
        elif problem is None and key in axes:
            problem = "is given twice"
        if problem is not None:
            fix = "write e.g. --sweep optimizer.learning_rate=1e-4,3e-4"
            problems.append(Problem("--sweep", option, problem, fix))
        else:
            axes[key] = values or []
    count = 1
    for values in axes.values():
        count *= len(values)
    if count > MAXIMUM_TASKS:
        problems.append(Problem("--sweep", None, f"makes {count} tasks, more than {MAXIMUM_TASKS}", "sweep less"))
    if problems:
        raise RefusedError(problems, title="sweep refused")
    return axes


def plan_sweep(
    name: str, recipe: Path, overrides: Sequence[str], axes: dict[str, list[Any]], directory: Path,
    check: Callable[[list[str]], object],
) -> Sweep:  # fmt: skip
    """Return the sweep of all combinations in ``axes``, each passed to ``check`` as a list of overrides.

    Raises RecipeError with the distinct problems of all combinations, and how many they are of; RefusedError for a
    secret, which sweep.json would hold in clear.
    """
    _refuse_secrets(overrides, axes)
    combinations = itertools.product(*axes.values())
    tasks = [
        Task(number, f"{task_stem(name)}-{number:04d}", dict(zip(axes, values, strict=True)))
        for number, values in enumerate(combinations, start=1)
    ]
    found: dict[str, Problem] = {}
    tasks_of: dict[str, list[int]] = {}
    for task in tasks:
        try:
            check([*overrides, *task.overrides(directory)])
        except RefusedError as error:
            for problem in error.problems or [Problem("recipe", None, str(error))]:
                found.setdefault(str(problem), problem)
                tasks_of.setdefault(str(problem), []).append(task.number)
    if found:
        raise RecipeError(_bounded(found, tasks_of, len(tasks)), title=f"sweep of {recipe} refused")
    return Sweep(str(recipe), list(overrides), tasks)


def _refuse_secrets(overrides: Sequence[str], axes: dict[str, list[Any]]) -> None:
    texts = [*overrides, *(f"{key}={as_yaml(value)}" for key, values in axes.items() for value in values)]
    keys = dict.fromkeys(text.partition("=")[0] for text in texts if _has_secret(text))
    if keys:
        rule = "looks like a secret, and sweep.json is kept and shown"
        fix = "read it from a file, by launch.slurm.setup"
        raise RefusedError([Problem(key, None, rule, fix) for key in keys], title="sweep refused")


def _has_secret(override: str) -> bool:
    key, _, text = override.partition("=")
    try:
        value: Any = parse_yaml(text)
    except YamlTextError:
        value = None
    return redacted_text(override) != override or redacted({key: value}) != {key: value}


def _bounded(found: dict[str, Problem], tasks_of: dict[str, list[int]], count: int) -> list[Problem]:
    problems: list[Problem] = []
    for text, problem in list(found.items())[:_SHOWN_PROBLEMS]:
        numbers = tasks_of[text]
        which = "all tasks" if len(numbers) == count else f"{len(numbers)} of {count} tasks, the first {numbers[0]}"
        problems.append(Problem(problem.key, problem.value, f"{problem.rule} ({which})", problem.fix))
    if len(found) > _SHOWN_PROBLEMS:
        problems.append(Problem("...", None, f"{len(found) - _SHOWN_PROBLEMS} more problems", "mend these first"))
    return problems


def _values(text: str) -> tuple[list[Any] | None, str | None]:
    """Return the values of ``V1,V2,...``, or what is wrong. A list has brackets, text with commas has quotes."""
    try:
        values: object = parse_yaml(f"[{text}]")
    except YamlTextError as error:
        return None, f"the values are not valid YAML: {error}"
    if not isinstance(values, list) or not values:
        return None, "has no values"
    items = cast("list[Any]", values)
    if len({as_yaml(item) for item in items}) < len(items):
        return None, "has the same value twice"
    return items, None
