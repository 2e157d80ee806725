"""Site profiles: what a cluster wants of every job, written once. A YAML file of the keys of ``launch.slurm``.

Precedence: defaults < profile < recipe < command line.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from trainer.config.launch import SlurmConfig
from trainer.config.load import read_mapping
from trainer.config.schema import slurm_section_problems
from trainer.config.slurm import slurm_problems
from trainer.config.suggest import nearest
from trainer.config.yaml_text import YamlTextError, parse_yaml
from trainer.core.errors import Problem, RefusedError
from trainer.core.resources import resource_directory

NONE = "none"
"""The profile that says nothing: not even the default is used."""
DEFAULT = "default"
"""The profile that is used where none is named, if the user has it."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAXIMUM_BYTES = 100_000
_READ_BY_RANKS = ("nodes", "gpus_per_node", "time", "signal_seconds")


@dataclass(frozen=True)
class Profile:
    """A site profile and where it was found."""

    name: str
    path: Path
    values: Mapping[str, Any]

    @property
    def under(self) -> dict[str, Any]:
        """What the recipe is laid over."""
        return {"launch": {"slurm": dict(self.values)}}

    def for_ranks(self, slurm: SlurmConfig) -> list[str]:
        """Return as overrides what ranks read of this profile: the job itself knows the recipe only."""
        return [_override(name, getattr(slurm, name)) for name in _READ_BY_RANKS if name in self.values]


def profile_of_recipe(recipe: Path, settings: Iterable[str], environment: Mapping[str, str]) -> Profile | None:
    """Return the profile that command line or recipe name; what else is wrong with them is said later."""
    section = read_mapping(recipe, settings, locked=False)[0] or {}
    for key in ("launch", "slurm"):
        below: Any = section.get(key)
        section = cast("dict[str, Any]", below) if isinstance(below, dict) else {}
    named: object = section.get("profile")
    return find_profile(named if isinstance(named, str) else None, environment)


def _override(name: str, value: Any) -> str:
    # Quoted: to YAML 30 is a number, and a time limit is text.
    return f"launch.slurm.{name}={value}" if isinstance(value, int) else f"launch.slurm.{name}='{value}'"


def user_directory(environment: Mapping[str, str]) -> Path:
    """Return where a user's profiles are: $XDG_CONFIG_HOME/trainer/profiles."""
    home = environment.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return Path(home) / "trainer" / "profiles"


def profile_directories(environment: Mapping[str, str]) -> list[Path]:
    """Return where profiles are looked for by name: the user's, the machine's, those we ship."""
    machine = (environment.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":")
    return [
        user_directory(environment),
        *(Path(directory) / "trainer" / "profiles" for directory in machine if directory.startswith("/")),
        resource_directory("slurm") / "profiles",
    ]


def find_profile(named: str | None, environment: Mapping[str, str]) -> Profile | None:
    """Return the profile ``named`` (a name, or a path with a slash or ``.yaml``), checked.

    Where none is named: the user's or the machine's ``default``, if there is one. Raises RefusedError for a profile
    that is not there, or has unknown keys or unusable values.
    """
    if named == NONE:
        return None
    if named is not None and ("/" in named or named.endswith((".yaml", ".yml"))):
        return _read(Path(os.path.expanduser(named)).stem, Path(os.path.expanduser(named)))
    if named is not None and not _NAME.fullmatch(named):
        rule = "is no name of a profile"
        raise RefusedError(Problem("launch.slurm.profile", named, rule, "write a name, or a path that ends in .yaml"))
    directories = profile_directories(environment)
    for directory in directories if named is not None else directories[:-1]:
        path = directory / f"{named or DEFAULT}.yaml"
        if path.is_file():
            return _read(named or DEFAULT, path)
    if named is None:
        return None
    known = sorted({path.stem for directory in directories for path in directory.glob("*.yaml")})
    close = nearest(named, known)
    fix = (
        f"did you mean {close}?"
        if close
        else f"use one of {', '.join(known)}, or `trainer submit --probe` to write one"
    )
    looked = ", ".join(str(directory) for directory in directories)
    raise RefusedError(Problem("launch.slurm.profile", named, f"is not in {looked}", fix))


def _read(name: str, path: Path) -> Profile:
    title = f"profile {path} refused"
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MAXIMUM_BYTES:
            raise RefusedError(f"{title}: it is no file of a profile's size")
        if found.st_mode & stat.S_IWOTH:
            raise RefusedError(
                f"{title}: everybody may write it, and its setup lines run in your jobs → chmod o-w {path}"
            )
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise RefusedError(f"{title}: {reason}") from error
    except YamlTextError as error:
        raise RefusedError(f"{title}: {error}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise RefusedError(f"{title}: it must be a mapping of the keys of launch.slurm → write e.g. partition: gpu")
    mapping = cast("dict[str, Any]", values)
    if any(key in mapping for key in ("launch", "slurm")):
        raise RefusedError(f"{title}: write the keys of launch.slurm without launch: and slurm: above them")
    problems = slurm_section_problems(mapping)
    if "profile" in mapping:
        problems.append(Problem("profile", mapping["profile"], "a profile names no other", "remove it"))
    if not problems:
        problems = slurm_problems(SlurmConfig.model_validate(mapping))
    if problems:
        raise RefusedError(problems, title=title)
    return Profile(name, path, mapping)
