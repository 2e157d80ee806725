"""Hosts of ``launch.launcher: ssh``: DeepSpeed's hostfile, and its filters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainer.config.launch import LaunchConfig
from trainer.core.errors import Problem, RecipeError

_NAME = r"(?:[A-Za-z0-9_][\w.-]*@)?[A-Za-z0-9][A-Za-z0-9._-]*"  # [user@]host; a leading dash would be an option of ssh
_LINE = re.compile(rf"({_NAME})\s+slots=([0-9]{{1,4}})", re.ASCII)
_FILTER = re.compile(rf"({_NAME})(?::([0-9]+(?:,[0-9]+)*))?", re.ASCII)


@dataclass(frozen=True)
class Host:
    """One line of a hostfile, what the filters left of it."""

    name: str
    slots: tuple[int, ...]
    """A rank each; on GPU hosts the numbers of the GPUs."""
    whole: bool = True
    """Whether no filter took a slot away."""

    @property
    def address(self) -> str:
        """The name without ``user@``."""
        return self.name.rpartition("@")[2]


def hosts_of(launch: LaunchConfig) -> list[Host]:
    """Return the hosts that ``launch`` names, in the file's order. Raises RecipeError with every problem."""
    if launch.hostfile is None:
        fix = "name a file with lines such as: worker-1 slots=8"
        raise RecipeError(Problem("launch.hostfile", None, "is needed by launch.launcher: ssh", fix))
    try:
        text = Path(launch.hostfile).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(Problem("launch.hostfile", launch.hostfile, f"can't be read ({error})")) from error
    hosts, problems = parse_hostfile(text)
    if launch.include is not None and launch.exclude is not None:
        problems.append(Problem("launch.exclude", launch.exclude, "can't be given beside launch.include", "keep one"))
    elif not problems and (filters := launch.include if launch.include is not None else launch.exclude) is not None:
        key = "launch.include" if launch.include is not None else "launch.exclude"
        hosts, problems = _filtered(hosts, filters, key)
    if not hosts and not problems:
        problems.append(Problem("launch.hostfile", launch.hostfile, "names no host that is left"))
    if problems:
        raise RecipeError(problems, title="the hosts can't be used")
    return hosts


def parse_hostfile(text: str) -> tuple[list[Host], list[Problem]]:
    """Return the hosts of a hostfile's text and what is wrong with its lines; ``#`` starts a comment."""
    hosts: dict[str, Host] = {}
    problems: list[Problem] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].strip()
        match = _LINE.fullmatch(words)
        key = f"launch.hostfile: line {number}"
        if not words:
            continue
        if match is None or int(match[2]) == 0:
            problems.append(Problem(key, line, "is not 'HOST slots=N'", "write e.g. worker-1 slots=8"))
        elif match[1] in hosts:
            problems.append(Problem(key, line, f"names {match[1]} again", "give each host one line"))
        else:
            hosts[match[1]] = Host(match[1], tuple(range(int(match[2]))))
    return list(hosts.values()), problems


def _filtered(hosts: Iterable[Host], text: str, key: str) -> tuple[list[Host], list[Problem]]:
    """``NAME@NAME:0,2``, as DeepSpeed's --include and --exclude take it; ``@`` parts hosts here, and not user names."""
    known = {host.address: host for host in hosts}
    named: dict[str, tuple[int, ...]] = {}
    for part in text.split("@"):
        match = _FILTER.fullmatch(part.strip())
        host = known.get(match[1]) if match else None
        if match is None or host is None:
            return [], [
                Problem(key, part, "is no host of launch.hostfile", "write HOST or HOST:SLOT,SLOT, parted by @")
            ]
        slots = tuple(sorted({int(slot) for slot in match[2].split(",")})) if match[2] else host.slots
        if not set(slots) <= set(host.slots):
            return [], [Problem(key, part, f"names a slot that {host.name} has not got (0-{len(host.slots) - 1})")]
        named[host.address] = slots
    left: list[Host] = []
    for address, host in known.items():
        if key == "launch.include":
            slots = named.get(address, ())
        else:
            slots = tuple(slot for slot in host.slots if slot not in named.get(address, ()))
        if slots:
            left.append(Host(host.name, slots, whole=slots == host.slots))
    return left, []
