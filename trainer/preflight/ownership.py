"""Rules about who may have written what a run starts from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.checkpoint import layout
from trainer.checkpoint.ownership import ownership_problems
from trainer.core.errors import Problem
from trainer.preflight.facts import Facts, Failing, Rule


def _resume(facts: Facts) -> Iterator[Problem]:
    if facts.recipe.checkpoint.resume != "never":
        run = facts.recipe.run
        yield from ownership_problems(Path(run.directory), "run.directory", run.group_access)


def _source(facts: Facts) -> Iterator[Problem]:
    path = facts.recipe.model.path
    if path is not None:
        yield from ownership_problems(Path(path), "model.path", facts.recipe.run.group_access)


def _open_run(tmp: Path) -> Path:
    step = layout.step_directory(tmp / "open", 5)
    step.mkdir(parents=True)
    layout.manifest_path(step).write_text(f'{{"format": "{layout.FORMAT}", "step": 5}}', encoding="utf-8")
    step.chmod(0o777)
    return tmp / "open"


def _open_to_resume(tmp: Path) -> dict[str, Any]:
    return {"run.directory": str(_open_run(tmp))}


def _open_source(tmp: Path) -> dict[str, Any]:
    return {"model.path": str(_open_run(tmp)), "model.config": None}


RULES = (
    Rule("nobody else can have changed a checkpoint to resume", _resume, Failing(prepare=_open_to_resume)),
    Rule("nobody else can have changed the run to start from", _source, Failing(prepare=_open_source)),
)
