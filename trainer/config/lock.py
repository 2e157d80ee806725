"""RECIPE.lock.json: the commit of every Hugging Face id that a recipe names, written by ``trainer fetch``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from trainer.core.errors import Problem

FORMAT, VERSION = "trainer-recipe-lock", 1
SECTIONS = ("model", "tokenizer")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Locked:
    """One pinned repository."""

    revision: str | None
    """What the recipe asked for when it was fetched; null: the default branch."""
    commit: str


def lock_path(recipe_path: Path) -> Path:
    """Return where the lock of a recipe lies: ``recipe.lock.json`` beside ``recipe.yaml``."""
    return recipe_path.with_suffix(".lock.json")


def is_hub_id(path: str) -> bool:
    """Return whether ``path`` is written as a Hugging Face id, and nothing here has that name."""
    return _ID.fullmatch(path) is not None and ".." not in path and not Path(path).exists()


def read_lock(path: Path) -> tuple[dict[str, Locked], list[Problem]]:
    """Return the pinned ids of a lock file (empty where there is none) and what is wrong with it."""
    try:
        content: object = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError, RecursionError) as error:
        return {}, [Problem("lock", str(path), f"can't be read ({error})", _AGAIN)]
    fields = cast("dict[str, Any]", content) if isinstance(content, dict) else {}
    if fields.get("format") != FORMAT or fields.get("version") != VERSION:
        return {}, [Problem("lock", str(path), f"is no {FORMAT} of version {VERSION}", _AGAIN)]
    locked: dict[str, Locked] = {}
    entries: object = fields.get("repositories")
    for name, value in cast("dict[str, object]", entries).items() if isinstance(entries, dict) else ():
        entry = cast("dict[str, object]", value) if isinstance(value, dict) else {}
        revision, commit = entry.get("revision"), entry.get("commit")
        if not (revision is None or isinstance(revision, str)) or not _is_commit(commit):
            return {}, [Problem("lock", str(path), f"has no commit of {name}", _AGAIN)]
        locked[name] = Locked(revision, cast("str", commit))
    return locked, []


_AGAIN = "remove it and run trainer fetch"


def lock_text(locked: Mapping[str, Locked]) -> str:
    """Return the file's content."""
    entries = {name: {"revision": locked[name].revision, "commit": locked[name].commit} for name in sorted(locked)}
    return json.dumps({"format": FORMAT, "version": VERSION, "repositories": entries}, indent=2) + "\n"


def apply_lock(mapping: dict[str, Any], recipe_path: Path) -> list[Problem]:
    """Set the revisions of ``mapping`` (unchecked) to the locked commits; return what contradicts the lock."""
    locked, problems = read_lock(lock_path(recipe_path))
    for name in SECTIONS:
        section: object = mapping.get(name)
        path = cast("dict[str, object]", section).get("path") if isinstance(section, dict) else None
        if not isinstance(path, str) or path not in locked or not is_hub_id(path):
            continue
        entry, fields = locked[path], cast("dict[str, object]", section)
        revision = fields.get("revision")
        if revision in (entry.revision, entry.commit, None):
            fields["revision"] = entry.commit
        else:
            rule = (
                f"contradicts {lock_path(recipe_path).name}, where {path} is {entry.revision or 'the default branch'}"
            )
            fix = "run trainer fetch again, or remove the revision"
            problems.append(Problem(f"{name}.revision", revision, rule, fix))
    return problems


def _is_commit(value: object) -> bool:
    return isinstance(value, str) and _COMMIT.fullmatch(value) is not None
