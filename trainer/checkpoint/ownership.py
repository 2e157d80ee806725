"""Whose checkpoints a run may load: its own user's or root's, where nobody else could have changed them.

Hashes find damage, not intent: who can write a checkpoint can write its hashes. Torch-free.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from trainer.checkpoint import layout
from trainer.core.errors import Problem
from trainer.core.private import GroupAccess


def ownership_problems(run_directory: Path, key: str, group: GroupAccess) -> list[Problem]:
    """Return why the checkpoints of ``run_directory``, named by ``key``, must not be loaded; one problem a reason.

    With ``group`` read the directory's group may write as well. Nothing is wrong where there is no checkpoint.
    """
    found = list(_facts(run_directory))
    foreign = [(path, facts) for path, facts in found if facts.st_uid not in (0, os.geteuid())]
    writable = [(path, facts) for path, facts in found if _others_write(facts, group)]
    problems: list[Problem] = []
    if foreign:
        path, facts = foreign[0]
        rule = f"holds what belongs to neither you nor root: {path} to user {facts.st_uid} ({len(foreign)} in all)"
        fix = f"if you trust it: cp -r {run_directory} to a directory of yours, or chown -R {os.geteuid()} it"
        problems.append(Problem(key, str(run_directory), rule, fix))
    if writable:
        rule = f"can be changed by others: {writable[0][0]} ({len(writable)} in all)"
        problems.append(Problem(key, str(run_directory), rule, f"if nobody did: chmod -R go-w {run_directory}"))
    return problems


def _facts(run_directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield what decides about every committed checkpoint: directories on the way, and each file."""
    steps = [path for _, path in layout.step_directories(run_directory)]
    directories = [run_directory, layout.checkpoints_directory(run_directory), *steps] if steps else []
    files = [Path(entry.path) for step in steps for entry in os.scandir(step)]
    for path in [*directories, *files]:
        try:
            facts = path.stat() if path in directories else path.lstat()
        except OSError:  # deleted meanwhile
            continue
        if not stat.S_ISLNK(facts.st_mode):  # the mode of a link means nothing, and none is followed
            yield path, facts


def _others_write(facts: os.stat_result, group: GroupAccess) -> bool:
    return bool(facts.st_mode & (stat.S_IWOTH if group == "read" else stat.S_IWOTH | stat.S_IWGRP))
