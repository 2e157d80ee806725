"""What a command may write to, where the result is made beside its name and then renamed."""

from __future__ import annotations

from pathlib import Path

from trainer.core.errors import Problem


def output_problem(output: Path) -> Problem | None:
    """Return what keeps ``--output`` from getting its name by a rename, None if nothing does."""
    if output.is_symlink():
        return Problem("--output", str(output), "is a link", "give the directory itself")
    if Path.cwd().is_relative_to(output.resolve()):
        return Problem("--output", str(output), "is or holds the current directory", "give another directory")
    if output.name == "..":
        return Problem("--output", str(output), "ends in ..", "give the directory by its name")
    return None
